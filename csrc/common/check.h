// Errors that name the op, the argument, what was expected of it and what came.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastfp8 {

// A problem with an argument. Reaches Python as RuntimeError, as every error of an operator of torch does.
template <class Expected, class Got>
[[noreturn]] void argument_error(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream text;
  text << "fastfp8." << op << ": argument '" << argument << "': expected " << expected << ", got " << got;
  throw std::runtime_error(text.str());
}

// The messages are built only when a check fails: a call on good arguments pays for the comparisons alone.
#define FASTFP8_CHECK_ARGUMENT(CONDITION, OP, ARGUMENT, EXPECTED, GOT)                  \
  do {                                                                                  \
    if (!(CONDITION)) [[unlikely]]                                                      \
      ::fastfp8::argument_error(OP, ARGUMENT, (std::ostringstream() << EXPECTED).str(), \
                                (std::ostringstream() << GOT).str());                   \
  } while (0)

}  // namespace fastfp8
