#include "builtins.h"

#include <cstdio>
#include <cstring>

#include "memory.h"

namespace emulator {
namespace {

constexpr size_t kMostText = 4096;

// A C string behind a generic address.
std::string text_at(Context& c, int lane, uint64_t address) {
  std::string text;
  while (text.size() < kMostText) {
    char letter;
    const Place place = locate(c, lane, std::nullopt, address + text.size(), 1, false);
    load(c, lane, place, &letter, 1, {});
    if (letter == 0) break;
    text += letter;
  }
  return text;
}

uint64_t number_at(Context& c, int lane, uint64_t& address, uint32_t bytes) {
  address = (address + bytes - 1) & ~static_cast<uint64_t>(bytes - 1);
  uint64_t value = 0;
  load(c, lane, locate(c, lane, std::nullopt, address, bytes, false), &value, bytes, {});
  address += bytes;
  return value;
}

// One conversion, "%-8.3lld" without its '*': `kind` is the last letter.
std::string convert(Context& c, int lane, const std::string& flags, bool wide, char kind, uint64_t& arguments) {
  char out[kMostText];
  switch (kind) {
    case 'd':
    case 'i': {
      const uint64_t bits = number_at(c, lane, arguments, wide ? 8 : 4);
      const auto value = wide ? static_cast<int64_t>(bits) : static_cast<int32_t>(bits);
      std::snprintf(out, sizeof out, (flags + "lld").c_str(), static_cast<long long>(value));
      return out;
    }
    case 'u':
    case 'x':
    case 'X':
    case 'o':
      std::snprintf(out, sizeof out, (flags + "ll" + kind).c_str(),
                    static_cast<unsigned long long>(number_at(c, lane, arguments, wide ? 8 : 4)));
      return out;
    case 'c':
      std::snprintf(out, sizeof out, (flags + "c").c_str(), static_cast<int>(number_at(c, lane, arguments, 4)));
      return out;
    case 's':
      return text_at(c, lane, number_at(c, lane, arguments, 8));
    case 'p':
      std::snprintf(out, sizeof out, "0x%llx", static_cast<unsigned long long>(number_at(c, lane, arguments, 8)));
      return out;
    default: {
      const uint64_t bits = number_at(c, lane, arguments, 8);
      double value;
      std::memcpy(&value, &bits, 8);
      std::snprintf(out, sizeof out, (flags + kind).c_str(), value);
      return out;
    }
  }
}

uint64_t print(Context& c, int lane, const std::vector<uint64_t>& arguments) {
  if (arguments.size() != 2) fail(c, "vprintf takes a format and a list");
  const std::string format = text_at(c, lane, arguments[0]);
  uint64_t list = arguments[1];
  std::string& out = c.machine.output;
  uint64_t conversions = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    std::string flags = "%";
    bool wide = false;
    for (++i; i < format.size() && std::strchr("-+ #0123456789.*lhz", format[i]); ++i) {
      if (format[i] == '*')
        flags += std::to_string(static_cast<int32_t>(number_at(c, lane, list, 4)));
      else if (format[i] == 'l' || format[i] == 'z')
        wide = true;
      else if (format[i] != 'h' && flags.size() < 16)
        flags += format[i];
    }
    if (i == format.size()) break;
    if (format[i] == '%')
      out += '%';
    else if (std::strchr("diuxXocspfFeEgGaA", format[i]))
      out += convert(c, lane, flags, wide, format[i], list), ++conversions;
    else
      fail(c, std::string("printf does not know %") + format[i]);
  }
  return conversions;
}

uint64_t fail_assertion(Context& c, int lane, const std::vector<uint64_t>& arguments) {
  if (arguments.size() != 5) fail(c, "__assertfail takes five arguments");
  const std::string condition = text_at(c, lane, arguments[0]), file = text_at(c, lane, arguments[1]);
  const std::string function = text_at(c, lane, arguments[3]);
  fail(c, file + ":" + std::to_string(static_cast<uint32_t>(arguments[2])) + ": " + function + ": assertion `" +
              condition + "` failed in thread " + std::to_string(c.warp.index * kLanes + lane));
}

uint64_t allocate(Context& c, int, const std::vector<uint64_t>& arguments) {
  if (arguments.size() != 1) fail(c, "malloc takes one argument");
  return c.machine.memory.allocate(arguments[0]);
}

uint64_t release(Context& c, int, const std::vector<uint64_t>& arguments) {
  if (arguments.size() != 1) fail(c, "free takes one argument");
  if (arguments[0] != 0 && !c.machine.memory.free(arguments[0])) fail(c, "free of what malloc has not given");
  return 0;
}

}  // namespace

Builtin find_builtin(const std::string& name) {
  if (name == "vprintf") return print;
  if (name == "__assertfail") return fail_assertion;
  if (name == "malloc") return allocate;
  if (name == "free") return release;
  return nullptr;
}

}  // namespace emulator
