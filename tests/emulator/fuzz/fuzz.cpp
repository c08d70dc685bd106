// Feeds mutated PTX to the emulator, which may do nothing but succeed or raise Error.
//
//   fuzz parse|decode|launch SEED SECONDS FAILURE FILE...
//
// Each stage includes those before it. An input that breaks the rule is left in the file FAILURE; with SECONDS 0 the
// FILEs are run as they are, each once. Launches run in child processes, because mutated kernels may loop for ever.
#include <sanitizer/common_interface_defs.h>
#include <sys/time.h>
#include <sys/wait.h>
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

constexpr unsigned kMostSeconds = 20;                      // of one input, without its kernels
constexpr itimerval kMostLaunchTime = {{}, {0, 250'000}};  // of its kernels: what takes longer hangs, which is legal

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
    const emulator::Module module = emulator::parse(input);
    if (stage == "parse") {
      emulator::describe(module);
      return true;
    }
    emulator::decode_all(module);
    if (stage == "launch") {
      // From here on time is no evidence.
      std::signal(SIGALRM, SIG_DFL);
      setitimer(ITIMER_REAL, &kMostLaunchTime, nullptr);
      emulator::launch_all(module, seed);
    }
    return true;
  } catch (const emulator::Error& error) {
    for (const char* c = error.what(); *c != '\0'; ++c) {
      if (static_cast<unsigned char>(*c) >= 0x80) broken(std::string("a message that is no text: ") + error.what());
    }
    if (report_errors) std::fprintf(stderr, "%s\n", error.what());
    return false;
  } catch (const std::exception& error) {
    broken(std::string("an exception that is no Error: ") + error.what());
  }
}

// As passes(), in a process of its own.
bool passes_apart(const std::string& stage, uint64_t seed) {
  const pid_t child = fork();
  if (child < 0) broken("no process for a launch");
  if (child == 0) std::_Exit(passes(stage, seed) ? 10 : 11);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) return true;  // it hangs
  if (WIFEXITED(status) && (WEXITSTATUS(status) == 10 || WEXITSTATUS(status) == 11)) return WEXITSTATUS(status) == 10;
  broken("a launch crashes");
}

bool run(const std::string& stage, uint64_t seed) {
  alarm(kMostSeconds);
  const bool passed = stage == "launch" ? passes_apart(stage, seed) : passes(stage, seed);
  alarm(0);
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s parse|decode|launch SEED SECONDS FAILURE FILE...\n", argv[0]);
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
    passed += run(stage, inputs);
    ++inputs;
  }
  std::printf("%llu inputs, of which %llu passed\n", static_cast<unsigned long long>(inputs),
              static_cast<unsigned long long>(passed));
  return 0;
}
