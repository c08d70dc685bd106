// Calls of device functions and returns from them, lane by lane.
#include <cstring>

#include "builtins.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr size_t kMostFrames = 512;

using Results = std::vector<Frame::Result>;

// What a call passes: a variable of the call's scope, or a register or constant of the parameter's size.
struct Argument {
  Source source;
  uint32_t bytes;  // 0 but for variables
};

struct Callee {
  uint32_t index;  // in Code::functions
  const Placed* placed;
};

bool is_active(const Context& c, int lane, uint32_t function) {
  for (const Frame& frame : c.warp.frames[lane])
    if (frame.function == function) return true;
  return false;
}

std::vector<uint8_t> bytes_of_argument(Context& c, int lane, const Argument& argument, uint64_t wanted) {
  std::vector<uint8_t> bytes(wanted);
  const uint64_t value = argument.source.get(c, lane);
  if (argument.bytes == 0) {
    std::memcpy(bytes.data(), &value, std::min<uint64_t>(8, wanted));
    return bytes;
  }
  const auto& params = c.warp.params[lane];
  const uint64_t at = value & ~kFrameParam;
  if (argument.bytes != wanted || at + wanted > params.size()) fail(c, "an argument has not the size of its parameter");
  std::memcpy(bytes.data(), params.data() + at, wanted);
  return bytes;
}

void set_register(Warp& warp, int lane, int index, const std::vector<uint8_t>& bytes) {
  uint64_t value = 0;
  std::memcpy(&value, bytes.data(), std::min<size_t>(sizeof value, bytes.size()));
  warp.reg(index)[lane] = value;
  warp.defined[index] |= 1u << lane;
}

void enter(Context& c, int lane, const Callee& callee, const std::vector<Argument>& arguments, const Results& results,
           const Placed& caller) {
  Warp& warp = c.warp;
  const Function& function = *callee.placed->function;
  if (function.parameters.size() != arguments.size() + results.size() ||
      static_cast<size_t>(function.results) != results.size())
    fail(c, "the function takes another number of arguments, or returns one of results");
  if (warp.frames[lane].size() >= kMostFrames) fail(c, "calls nested deeper than " + std::to_string(kMostFrames));
  Frame frame{warp.pc[lane] + 1, callee.index, warp.local_base[lane], warp.param_base[lane], &results, {}};
  if (is_active(c, lane, callee.index)) {
    for (size_t i = 0; i < function.registers.size(); ++i)
      frame.saved.push_back(warp.reg(callee.placed->first_register + static_cast<int>(i))[lane]);
  }
  const uint32_t params = warp.param_base[lane] + param_frame(*caller.function);
  const uint32_t local = warp.local_base[lane] + local_frame(*caller.function);
  std::vector<std::vector<uint8_t>> values;
  for (size_t i = 0; i < arguments.size(); ++i)
    values.push_back(bytes_of_argument(c, lane, arguments[i], function.parameters[results.size() + i].bytes));
  warp.params[lane].resize(params + param_frame(function), 0xff);
  warp.local[lane].resize(local + local_frame(function), 0xff);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Variable& to = function.parameters[results.size() + i];
    std::memcpy(warp.params[lane].data() + params + to.offset, values[i].data(), values[i].size());
    if (to.register_index >= 0) set_register(warp, lane, callee.placed->first_register + to.register_index, values[i]);
  }
  warp.param_base[lane] = params, warp.local_base[lane] = local;
  warp.frames[lane].push_back(std::move(frame));
  warp.pc[lane] = callee.placed->first_pc;
  warp.private_writes++;
}

void leave(Context& c, int lane) {
  Warp& warp = c.warp;
  const Frame frame = std::move(warp.frames[lane].back());
  warp.frames[lane].pop_back();
  const Placed& callee = c.grid.code->functions[frame.function];
  const Function& function = *callee.function;
  std::vector<std::vector<uint8_t>> values;
  for (size_t i = 0; i < frame.results->size(); ++i) {
    const Variable& from = function.parameters[i];
    if (from.bytes != (*frame.results)[i].bytes && (*frame.results)[i].index < 0)
      fail(c, "a result has not the size of its parameter");
    const uint8_t* at = warp.params[lane].data() + warp.param_base[lane] + from.offset;
    if (from.register_index >= 0)
      at = reinterpret_cast<const uint8_t*>(warp.reg(callee.first_register + from.register_index) + lane);
    values.emplace_back(at, at + std::min<uint64_t>(from.bytes, from.register_index >= 0 ? 8 : from.bytes));
  }
  for (size_t i = 0; i < frame.saved.size(); ++i)
    warp.reg(callee.first_register + static_cast<int>(i))[lane] = frame.saved[i];
  warp.param_base[lane] = frame.param_base, warp.local_base[lane] = frame.local_base;
  for (size_t i = 0; i < values.size(); ++i) {
    const Frame::Result& to = (*frame.results)[i];
    if (to.index < 0) {
      std::memcpy(warp.params[lane].data() + frame.param_base + to.offset, values[i].data(), values[i].size());
      continue;
    }
    set_register(warp, lane, to.index, values[i]);
  }
  warp.pc[lane] = frame.return_pc;
  warp.private_writes++;
}

Results results_of(const Decoder& d, const Operand& list) {
  Results results;
  for (const Operand& element : list.elements) {
    if (element.kind != Operand::Kind::kVariable) {
      results.push_back({d.destination(element), 0, 8});
      continue;
    }
    const Variable& to = d.variable(element);
    if (to.space != Space::kParam) d.unknown("result");
    results.push_back({-1, to.offset, static_cast<uint32_t>(to.bytes)});
  }
  return results;
}

std::vector<Argument> arguments_of(const Decoder& d, const Operand& list) {
  std::vector<Argument> arguments;
  for (const Operand& element : list.elements) {
    const bool variable = element.kind == Operand::Kind::kVariable && d.variable(element).space == Space::kParam;
    arguments.push_back({d.source(element), variable ? static_cast<uint32_t>(d.variable(element).bytes) : 0});
  }
  return arguments;
}

Handler builtin(Builtin function, Results results, std::vector<Argument> arguments) {
  return [=](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      std::vector<uint64_t> values;
      for (const Argument& argument : arguments) {
        const auto bytes = bytes_of_argument(c, lane, argument, argument.bytes ? argument.bytes : 8);
        uint64_t value = 0;
        std::memcpy(&value, bytes.data(), std::min<size_t>(8, bytes.size()));
        values.push_back(value);
      }
      const uint64_t result = function(c, lane, values);
      if (results.empty()) return;
      const Frame::Result& to = results[0];
      if (to.index >= 0) {
        c.warp.reg(to.index)[lane] = result;
        c.warp.defined[to.index] |= 1u << lane;
      } else {
        auto& params = c.warp.params[lane];
        const uint64_t at = c.warp.param_base[lane] + to.offset;
        if (to.bytes > 8 || at + to.bytes > params.size()) fail(c, "a result has not the size of its parameter");
        std::memcpy(params.data() + at, &result, to.bytes);
      }
    });
    return Outcome::kNext;
  };
}

Handler call(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  d.operands(3);
  auto results = std::make_shared<Results>(results_of(d, d.operand(0)));
  auto arguments = arguments_of(d, d.operand(2));
  const Operand& callee = d.operand(1);
  const Placed* caller = &d.placed;
  if (callee.kind == Operand::Kind::kFunction && d.code.find(callee.name) == nullptr) {
    const Builtin function = find_builtin(callee.name);
    if (function == nullptr) d.unknown("function, which has no body, " + callee.name);
    return builtin(function, *results, std::move(arguments));
  }
  return [=, target = d.source(callee)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const uint64_t value = target.get(c, lane);
      const Placed* placed = c.grid.code->find(value);
      if (placed == nullptr) fail(c, "a call of what is no function with a body");
      const auto index = static_cast<uint32_t>(placed - c.grid.code->functions.data());
      enter(c, lane, {index, placed}, arguments, *results, *caller);
    });
    return Outcome::kJumped;
  };
}

// The end of lanes: ret of the entry, exit anywhere.
void exit_lanes(Context& c, uint32_t lanes) {
  for_lanes(lanes, [&](int lane) {
    if (c.warp.open_group[lane]) fail(c, "the thread exits with bulk copies that it never committed to a group");
    for (const auto& group : c.warp.bulk_groups[lane])
      if (!group->flights.empty()) fail(c, "the thread exits without a wait for a bulk copy to read shared memory");
  });
  if (!c.warp.wgmma.empty()) fail(c, "the warp exits with wgmma in flight");
  c.warp.live &= ~lanes;
  if (lanes) threads_exited(c);
}

Handler return_or_exit(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  d.operands(0);
  return [exits = d.instruction.opcode == "exit"](Context& c) {
    uint32_t ends = 0;
    for_lanes(c.mask, [&](int lane) {
      if (exits || c.warp.frames[lane].empty())
        ends |= 1u << lane;
      else
        leave(c, lane);
    });
    exit_lanes(c, ends);
    return Outcome::kJumped;
  };
}

}  // namespace

Handler decode_call(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "call") return call(d);
  if (op == "ret" || op == "exit") return return_or_exit(d);
  return {};
}

}  // namespace emulator
