// PTX that is wrong in random ways.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace emulator {

class Mutator {
 public:
  Mutator(std::vector<std::string> corpus, uint64_t seed);

  // A text of the corpus after one to six changes, or now and then nothing but random characters or tokens.
  std::string next();

 private:
  using Tokens = std::vector<std::string>;

  size_t below(size_t n) { return static_cast<size_t>(random_() % n); }
  const std::string& any_token();
  const std::string& alike(const Tokens& tokens, size_t at);
  void change_bytes(std::string& text);
  void change_lines(std::string& text);
  void change_tokens(std::string& text);
  std::string noise();

  std::mt19937_64 random_;
  std::vector<std::string> corpus_;
  Tokens tokens_;  // of the whole corpus, and awkward ones
};

}  // namespace emulator
