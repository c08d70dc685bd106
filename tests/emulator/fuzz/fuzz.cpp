// Feeds mutated PTX to the emulator, which may do nothing but succeed or raise Error.
//
//   fuzz parse|load|launch SEED SECONDS FAILURE FILE...
//
// Each stage includes those before it. An input that breaks the rule is left in the file FAILURE; with SECONDS 0 the
// FILEs are run as they are, each once. SEED is that of the mutations and of every launch.
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/lsan_interface.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "launch.h"
#include "mutate.h"

// An abort counts as a crash, and an input that eats all memory as well.
extern "C" const char* __asan_default_options() { return "handle_abort=1:hard_rss_limit_mb=6000"; }

namespace {

constexpr unsigned kMostSeconds = 20;  // of one input

std::string input, failure;  // what is run, and where it goes if it breaks the rule
bool report_errors = false;

void keep_input() { std::ofstream(failure, std::ios::binary) << input; }

[[noreturn]] void broken(const std::string& what) {
  keep_input();
  std::fprintf(stderr, "%s; the input is in %s\n", what.c_str(), failure.c_str());
  std::_Exit(1);
}

void on_alarm(int) {
  keep_input();
  const char text[] = "an input takes too long\n";
  std::_Exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? 3 : 2);
}

// Whether the input passed all of the stage without an Error.
bool passes(const std::string& stage, uint64_t seed) {
  try {
    if (stage == "parse") {
      emulator::describe(emulator::parse(input));
      return true;
    }
    const auto loaded = std::make_shared<const emulator::LoadedModule>(input);
    if (stage == "launch") emulator::launch_all(loaded, seed);
    return true;
  } catch (const emulator::Error& error) {
    for (const char* c = error.what(); *c != '\0'; ++c) {
      if (static_cast<unsigned char>(*c) >= 0x80) broken(std::string("a message that is no text: ") + error.what());
    }
    if (stage != "launch" && std::strstr(error.what(), "line ") == nullptr)
      broken(std::string("a message without a line: ") + error.what());
    if (report_errors) std::fprintf(stderr, "%s\n", error.what());
    return false;
  } catch (const std::exception& error) {
    broken(std::string("an exception that is no Error: ") + error.what());
  }
}

bool run(const std::string& stage, uint64_t seed) {
  alarm(kMostSeconds);
  const bool passed = passes(stage, seed);
  alarm(0);
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s parse|load|launch SEED SECONDS FAILURE FILE...\n", argv[0]);
    return 2;
  }
  const std::string stage = argv[1];
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const auto seconds = std::chrono::seconds(std::strtoll(argv[3], nullptr, 10));
  failure = argv[4];
  std::vector<std::string> corpus;
  for (int i = 5; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  __sanitizer_set_death_callback(keep_input);
  std::signal(SIGALRM, on_alarm);
  report_errors = seconds.count() == 0;
  uint64_t inputs = 0, passed = 0;
  for (const std::string& text : corpus) {
    input = text;
    passed += run(stage, seed);
    ++inputs;
  }
  emulator::Mutator mutator(std::move(corpus), seed);
  const auto end = std::chrono::steady_clock::now() + seconds;
  while (std::chrono::steady_clock::now() < end) {
    input = mutator.next();
    passed += run(stage, seed);
    ++inputs;
  }
  __lsan_do_leak_check();  // at exit it would be too late for the callback
  std::printf("%llu inputs, of which %llu passed\n", static_cast<unsigned long long>(inputs),
              static_cast<unsigned long long>(passed));
  return 0;
}
