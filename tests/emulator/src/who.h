// Who does something, for messages: in words that are only made where they are needed.
#pragma once
#include <ostream>
#include <string>

namespace emulator {

struct Context;

class Who {
 public:
  // These do not own what they name.
  Who(const Context& context) : context_(&context) {}
  Who(const std::string& text) : text_(text.c_str()) {}
  Who(const char* text) : text_(text) {}

  Who with(const char* part) const {
    Who of = *this;
    of.part_ = part;
    return of;
  }
  std::string str() const;

 private:
  const Context* context_ = nullptr;
  const char *text_ = "", *part_ = "";
};

inline std::string operator+(const Who& who, const std::string& rest) { return who.str() + rest; }
inline std::ostream& operator<<(std::ostream& out, const Who& who) { return out << who.str(); }

}  // namespace emulator
