// Places variables: each function's parameters and local memory, and each kernel's shared memory.
#include <algorithm>
#include <map>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "parser.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;
using Kernels = std::set<Function*>;

constexpr uint64_t kMostEntryParameters = 32764, kMostFrame = 1 << 20, kMostLocal = 512 << 10;
constexpr uint64_t kMostShared = 227 << 10, kMostConst = 64 << 10, kMostGlobal = 1 << 30;
constexpr int64_t kMostSharedVariables = 1 << 12;

constexpr uint64_t round_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) & ~(alignment - 1); }

bool is_in_shared(const Variable& v) { return v.space == Space::kShared; }
bool is_dynamic(const Variable& v) { return v.space == Space::kShared && v.is_extern; }

void check(uint64_t bytes, uint64_t most, const std::string& what) {
  if (bytes > most) {
    throw Error(what + ": " + std::to_string(bytes) + " bytes, but the most is " + std::to_string(most));
  }
}

void place_all(std::vector<Variable>& variables, Space space, uint64_t& end) {
  for (Variable& v : variables) {
    if (v.space != space) continue;
    v.offset = round_up(end, v.alignment);
    end = v.offset + v.bytes;
  }
}

class Layout {
 public:
  explicit Layout(Module& module) : module_(module) {}

  void place_shared() {
    if (std::ranges::count_if(module_.variables, is_in_shared) > kMostSharedVariables) {
      throw Error("more .shared variables of the module than the emulator takes");
    }
    find_references();
    for (auto& [name, f] : module_.functions) {
      if (f.is_entry) reach(f);
    }
    // What kernels share must lie at the same place in all of them.
    for (size_t i = 0; i < module_.variables.size(); ++i) {
      Variable& v = module_.variables[i];
      if (v.space == Space::kShared && !v.is_extern) place(v, users_of_variable_[static_cast<int>(i)]);
    }
    for (const bool is_entry : {false, true}) {
      for (auto& [name, f] : module_.functions) {
        if (f.is_entry != is_entry) continue;
        for (Variable& v : f.variables) {
          if (v.space == Space::kShared && !v.is_extern) place(v, users_[&f]);
        }
      }
    }
    place_dynamic();
  }

 private:
  struct References {
    std::set<int> variables;  // indices into Module::variables
    std::set<Function*> functions;
  };

  void find_references() {
    for (auto& [name, f] : module_.functions) {
      references_.try_emplace(&f);
      const int own = static_cast<int>(f.parameters.size() + f.variables.size());
      for (const Instruction& instruction : f.instructions) {
        for (const Operand& o : instruction.operands) {
          note(f, own, o);
          for (const Operand& element : o.elements) note(f, own, element);
        }
        if (instruction.opcode == "call" && instruction.operands[1].kind == Kind::kFunction) continue;
        for (const Operand& o : instruction.operands) {
          if (o.kind == Kind::kFunction) take_address(o.name);
        }
      }
    }
    for (const Variable& v : module_.variables) {
      for (const Relocation& r : v.relocations) {
        if (!r.function.empty()) take_address(r.function);
      }
    }
  }

  void take_address(const std::string& name) {
    Function& f = module_.functions.at(name);
    if (!f.is_entry) by_address_.insert(&f);
  }

  void note(Function& f, int own, const Operand& o) {
    const int index = o.index - own;  // into Module::variables
    if (o.kind == Kind::kVariable && index >= 0 && is_in_shared(module_.variables[static_cast<size_t>(index)])) {
      references_[&f].variables.insert(index);
    }
    if (o.kind == Kind::kFunction) references_[&f].functions.insert(&module_.functions.at(o.name));
  }

  // All that `kernel` may run: what it calls, and what any call by address may mean.
  void reach(Function& kernel) {
    std::unordered_set<Function*> seen(by_address_.begin(), by_address_.end());
    seen.insert(&kernel);
    std::vector<Function*> open(seen.begin(), seen.end());
    while (!open.empty()) {
      Function* f = open.back();
      open.pop_back();
      if (std::ranges::any_of(f->variables, is_in_shared)) users_[f].insert(&kernel);
      const References& references = references_.at(f);
      for (int variable : references.variables) users_of_variable_[variable].insert(&kernel);
      for (Function* callee : references.functions) {
        if (seen.insert(callee).second) open.push_back(callee);
      }
    }
  }

  void place(Variable& v, const Kernels& kernels) {
    uint64_t begin = 0;
    for (const Function* kernel : kernels) begin = std::max(begin, kernel->shared_bytes);
    v.offset = round_up(begin, v.alignment);
    for (Function* kernel : kernels) kernel->shared_bytes = v.offset + v.bytes;
  }

  // A device function's extern array begins at one place, whichever kernel calls.
  void place_dynamic() {
    Kernels together;
    uint64_t begin = 0, alignment = 1;
    for (auto& [name, f] : module_.functions) {
      if (f.is_entry) continue;
      for (const Variable& v : f.variables) {
        if (!is_dynamic(v)) continue;
        alignment = std::max<uint64_t>(alignment, v.alignment);
        together.insert(users_[&f].begin(), users_[&f].end());
      }
    }
    for (const Function* kernel : together) begin = std::max(begin, kernel->shared_bytes);
    begin = round_up(begin, alignment);
    for (Function* kernel : together) kernel->shared_bytes = begin;
    for (auto& [name, f] : module_.functions) {
      for (Variable& v : f.variables) {
        if (is_dynamic(v)) v.offset = f.is_entry ? round_up(f.shared_bytes, v.alignment) : begin;
      }
    }
  }

  Module& module_;
  std::unordered_map<Function*, References> references_;
  std::set<Function*> by_address_;
  std::map<Function*, Kernels> users_;
  std::map<int, Kernels> users_of_variable_;
};

}  // namespace

void lay_out(Module& module) {
  Layout(module).place_shared();
  uint64_t constants = 0, global = 0;
  place_all(module.variables, Space::kConst, constants);
  for (const Variable& v : module.variables) global += v.space == Space::kGlobal ? v.bytes : 0;
  check(constants, kMostConst, ".const variables of the module");
  check(global, kMostGlobal, ".global variables of the module");
  for (auto& [name, f] : module.functions) {
    const std::string where = "line " + std::to_string(f.line) + ": " + name + ", ";
    place_all(f.parameters, Space::kParam, f.param_bytes);
    if (f.is_entry) check(f.param_bytes, kMostEntryParameters, where + "parameters");
    place_all(f.variables, Space::kParam, f.param_bytes);
    place_all(f.variables, Space::kLocal, f.local_bytes);
    check(f.param_bytes, kMostFrame, where + ".param variables");
    check(f.local_bytes, kMostLocal, where + ".local variables");
    check(f.shared_bytes, kMostShared, where + ".shared variables");
  }
}

}  // namespace emulator
