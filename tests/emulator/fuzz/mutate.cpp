#include "mutate.h"

#include <algorithm>
#include <utility>

namespace emulator {
namespace {

bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '$' ||
         c == '%' || c == '.' || c == ':';
}

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Every token with the white space behind it, so that together they are the text.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> tokens;
  for (size_t i = 0; i < text.size();) {
    size_t end = i + 1;
    if (is_word(text[i])) {
      while (end < text.size() && is_word(text[end])) ++end;
    }
    while (end < text.size() && is_space(text[end])) ++end;
    tokens.push_back(text.substr(i, end - i));
    i = end;
  }
  return tokens;
}

}  // namespace

Mutator::Mutator(std::vector<std::string> corpus, uint64_t seed) : random_(seed), corpus_(std::move(corpus)) {
  for (const std::string& text : corpus_) {
    for (std::string& token : split(text)) tokens_.push_back(std::move(token));
  }
  std::ranges::sort(tokens_);
  const auto repeated = std::ranges::unique(tokens_);
  tokens_.erase(repeated.begin(), repeated.end());
  for (const char* awkward : {"-1",
                              "0",
                              "4294967295",
                              "18446744073709551615",
                              "-9223372036854775808",
                              "0x8000000000000000",
                              "1 << 63",
                              "1e999",
                              "0f7fc00000",
                              "0dffffffffffffffff",
                              "{",
                              "}",
                              "{}",
                              "[",
                              "]",
                              "[_]",
                              "()",
                              "_",
                              "!",
                              "|",
                              "@",
                              "\"",
                              "/*",
                              "//",
                              ".b128",
                              ".pred",
                              ".v4",
                              "WARP_SZ",
                              "%tid.x",
                              "%r99999",
                              ".extern .shared .b8 x[];",
                              "ret;",
                              "%r<1048576>",
                              "generic(",
                              ".align 1048576",
                              "[4294967295]",
                              "{_, _}",
                              "[1]",
                              "[%tid.x]",
                              "\xff",
                              "L: "}) {
    tokens_.emplace_back(std::string(awkward) + " ");
  }
}

const std::string& Mutator::any_token() { return tokens_[below(tokens_.size())]; }

std::string Mutator::next() {
  if (below(64) == 0) return noise();
  std::string text = corpus_[below(corpus_.size())];
  for (size_t changes = 1 + below(1 + below(6)); changes > 0; --changes) {
    switch (below(8)) {
      case 0:
        change_bytes(text);
        break;
      case 1:
      case 2:
      case 3:
        change_lines(text);
        break;
      default:
        change_tokens(text);
    }
  }
  if (below(16) == 0) text.resize(below(text.size() + 1));
  return text;
}

void Mutator::change_bytes(std::string& text) {
  if (text.empty()) return;
  const size_t at = below(text.size()), count = std::min(1 + below(16), text.size() - at);
  switch (below(4)) {
    case 0:
      text[at] = static_cast<char>(random_());
      break;
    case 1:
      text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
      break;
    case 2:
      text.erase(at, count);
      break;
    default:
      text.insert(at, text.substr(at, count));
  }
}

// Statements, in the corpus: what comes out is mostly PTX, with another meaning.
void Mutator::change_lines(std::string& text) {
  Tokens lines;
  for (size_t begin = 0, end; begin < text.size(); begin = end) {
    end = std::min(text.find('\n', begin), text.size() - 1) + 1;
    lines.push_back(text.substr(begin, end - begin));
  }
  if (lines.empty()) return;
  const size_t at = below(lines.size()), other = below(lines.size());
  const auto place = lines.begin() + static_cast<std::ptrdiff_t>(at);
  switch (below(3)) {
    case 0:
      std::swap(lines[at], lines[other]);
      break;
    case 1:
      lines.erase(place);
      break;
    default:
      lines.insert(place, lines[other]);
  }
  text.clear();
  for (const std::string& line : lines) text += line;
}

// One that begins as this one does, such as another register of its kind: most such changes are still PTX.
const std::string& Mutator::alike(const Tokens& tokens, size_t at) {
  for (int tries = 0; tries < 50; ++tries) {
    const std::string& other = tokens[below(tokens.size())];
    if (other != tokens[at] && other.substr(0, 2) == tokens[at].substr(0, 2)) return other;
  }
  return any_token();
}

void Mutator::change_tokens(std::string& text) {
  Tokens tokens = split(text);
  if (tokens.empty()) return;
  const size_t at = below(tokens.size()), other = below(tokens.size());
  const auto place = tokens.begin() + static_cast<std::ptrdiff_t>(at);
  switch (below(9)) {
    case 0:
      std::swap(tokens[at], tokens[other]);
      break;
    case 1:
      tokens.erase(place);
      break;
    case 2:
      tokens.insert(place, tokens[other]);
      break;
    case 3:
      tokens.insert(place, any_token());
      break;
    case 4:
      tokens[at] = tokens[other];
      break;
    case 5:
      tokens[at] = any_token();
      break;
    default:
      tokens[at] = alike(tokens, at);
  }
  text.clear();
  for (const std::string& token : tokens) text += token;
}

std::string Mutator::noise() {
  std::string text = below(2) == 0 ? ".version 8.0 .target sm_90a .entry k() { .reg .b32 %r<9>; " : "";
  for (size_t left = below(200); left > 0; --left) {
    if (below(2) == 0) {
      text += any_token();
    } else {
      text += static_cast<char>(random_());
    }
  }
  return text;
}

}  // namespace emulator
