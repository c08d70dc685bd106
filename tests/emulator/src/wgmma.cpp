// wgmma: issued by the four warps of a warpgroup, run some time later and in order, visible to a warp once it waits.
#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "descriptor.h"

namespace emulator {
namespace {

constexpr int kRows = 64, kWarps = 4, kWarpRows = kRows / kWarps;
constexpr int kMostN = 256, kMostPending = 7;
// What a register holds while it belongs to the tensor core.
constexpr uint64_t kPoison = 0x7fc0dead;

std::string describe(const Instruction& instruction) {
  return "line " + std::to_string(instruction.line) + ": " +
         instruction.text.substr(0, instruction.text.find_first_of("{ "));
}

// Whether the whole warp is here; the lanes wait for others that are elsewhere.
bool whole_warp(Context& c) {
  if (c.warp.live != kAllLanes) fail(c, "wgmma is executed by all lanes of a warp, and some have exited");
  return converged(c);
}

template <class F>
void for_shared_operands(const Cta& cta, const WgmmaIssue& issue, const Who& who, F&& f) {
  const WgmmaForm& form = *issue.form;
  const auto visit = [&](int, int, uint32_t offset) { f(offset); };
  if (form.fragments.empty()) for_granules(cta, issue.a, kRows, form.a_transposed, who.with(" A"), visit);
  for_granules(cta, issue.b, form.n, form.b_transposed, who.with(" B"), visit);
}

int shape_of(const WgmmaForm& form) {
  return (form.n << 8 | size_of(form.format.b) << 4 | static_cast<int>(form.format.d)) << 1;
}

std::string missing_fence(const Code& code, int index) {
  return "no wgmma.fence since register " + code.register_name(index) +
         " was last used by something else than wgmma of this shape";
}

void cover_registers(Warp& warp) {
  warp.wgmma.values.resize(warp.registers.size());
  warp.wgmma.registers.resize(warp.registers.size() / kLanes);
}

void check_defined(const Context& c, const std::vector<int>& registers) {
  for (int index : registers) {
    if (c.warp.defined[index] != kAllLanes)
      fail(c, "it reads " + c.grid.code->register_name(index) + ", uninitialised in some lanes");
  }
}

// Marks the registers of a wgmma as its own, and raises if they are not free for it.
void claim(const Context& c, const WgmmaForm& form) {
  WgmmaState& state = c.warp.wgmma;
  const Code& code = *c.grid.code;
  if (state.fences == 0) fail(c, "no wgmma.fence before the first wgmma");
  cover_registers(c.warp);
  const int shape = shape_of(form);
  for (int index : form.fragments) {
    WgmmaState::Register& r = state.registers[index];
    if (r.accumulating > 0) fail(c, state.holder(code, index));
    if (r.accessed >= state.fences && r.user != WgmmaState::kFragment) fail(c, missing_fence(code, index));
    r.accessed = state.fences, r.user = WgmmaState::kFragment;
    r.reading++;
  }
  for (int index : form.accumulators) {
    WgmmaState::Register& r = state.registers[index];
    if (r.reading > 0 || (r.accumulating > 0 && r.user != shape)) fail(c, state.holder(code, index));
    if (r.accessed >= state.fences && r.user != shape) fail(c, missing_fence(code, index));
    r.accessed = state.fences, r.user = shape;
    if (r.accumulating++ > 0) continue;
    uint64_t* registers = c.warp.reg(index);
    for (int lane = 0; lane < kLanes; ++lane) {
      state.values[index * kLanes + lane] = static_cast<uint32_t>(registers[lane]);
      registers[lane] = kPoison;
    }
  }
}

// The oldest wgmma of a warp is done and waited for: its registers are ordinary ones again.
void retire(const Context& c) {
  WgmmaState& state = c.warp.wgmma;
  const WgmmaIssue& issue = state.issues.front();
  for_shared_operands(c.cta, issue, c, [&](uint32_t offset) { hold_reads(c.cta, offset, kGranule, -1, nullptr, ""); });
  for (int index : issue.form->fragments) state.registers[index].reading--;
  for (int index : issue.form->accumulators) {
    if (--state.registers[index].accumulating > 0) continue;
    uint64_t* registers = c.warp.reg(index);
    for (int lane = 0; lane < kLanes; ++lane) registers[lane] = state.values[index * kLanes + lane];
  }
  state.issues.pop_front();
  state.retired++;
}

// The registers of a vector operand, each of 4 bytes and once.
std::vector<int> registers_of(const Decoder& d, const Operand& operand, size_t count) {
  std::vector<int> out;
  for (const Operand& element : operand.elements) {
    if (element.kind != Operand::Kind::kRegister) d.unknown("operand, which must be of registers");
    const std::string& type = d.placed.function->registers[element.index].type;
    if (type == "pred" || type_bytes(type) != 4) d.unknown("type of a register, which must have 32 bits");
    out.push_back(d.placed.first_register + element.index);
  }
  if (out.size() != count) d.unknown("number of registers, which must be " + std::to_string(count));
  std::vector<int> sorted = out;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) d.unknown("register twice in one operand");
  return out;
}

int64_t literal(const Decoder& d, size_t index, std::initializer_list<int64_t> legal) {
  const Operand& operand = d.operand(index);
  if (operand.kind != Operand::Kind::kInteger || std::find(legal.begin(), legal.end(), operand.integer) == legal.end())
    d.unknown("immediate " + std::to_string(index));
  return operand.integer;
}

bool legal_n(Element element, int n) { return !is_integer(element) || n <= 32 || n % 16 == 0; }

// .shape{.satfinite}.dtype.atype.btype{.satfinite}
void decode_format(const Decoder& d, WgmmaForm& form) {
  const std::string shape = d.next();
  bool saturated = d.take("satfinite");
  const std::string dtype = d.next(), atype = d.next(), btype = d.next();
  saturated = d.take("satfinite") || saturated;
  d.expect_done();
  const auto format = matrix_format(dtype, atype, btype);
  if (!format || (saturated && format->d != Result::kS32)) d.unknown("combination of types");
  form.format = *format;
  form.format.saturated = saturated;
  if (is_fp8(format->a)) form.format.aligned_bits = kFp8Bits;
  const std::string k = "k" + std::to_string(kOperandRowBytes / size_of(format->a));
  for (int n = 8; n <= kMostN; n += 8) {
    if (shape == "m64n" + std::to_string(n) + k && legal_n(format->a, n)) form.n = n;
  }
  if (form.n == 0) d.unknown("shape");
}

Handler mma(const Decoder& d) {
  d.touched.owns = true;
  auto form = std::make_shared<WgmmaForm>();
  form->instruction = &d.instruction;
  decode_format(d, *form);
  using Kind = Operand::Kind;
  MatrixFormat& format = form->format;
  form->accumulators = registers_of(d, d.operand(0), format.d == Result::kF16 ? form->n / 4 : form->n / 2);
  const bool from_registers = d.operand(1).kind == Kind::kVector;
  if (from_registers) form->fragments = registers_of(d, d.operand(1), 4);
  for (int index : form->fragments) {
    if (std::count(form->accumulators.begin(), form->accumulators.end(), index))
      d.unknown("register that is both accumulator and A");
  }
  if (d.operand(3).kind == Kind::kRegister) {
    if (d.placed.function->registers[d.operand(3).index].type != "pred") d.unknown("scale-d, which is a predicate");
  } else {
    literal(d, 3, {0, 1});
  }
  size_t count = 4;
  if (!is_integer(format.a)) {
    format.negated = literal(d, count, {-1, 1}) * literal(d, count + 1, {-1, 1}) < 0;
    count += 2;
  }
  if (format.a == Element::kF16 || format.a == Element::kBf16) {
    if (!from_registers) form->a_transposed = literal(d, count++, {0, 1}) == 1;
    form->b_transposed = literal(d, count++, {0, 1}) == 1;
  }
  d.operands(count);
  const Source a = from_registers ? Source{} : d.source(1), b = d.source(2), p = d.source(3);
  return [form, a, b, p](Context& c) {
    if (!whole_warp(c)) return Outcome::kBlocked;
    const size_t first = c.warp.index / kWarps * kWarps;
    if (first + kWarps > c.cta.warps.size())
      fail(c, "wgmma is executed by a warpgroup, and the CTA has no warps " + std::to_string(c.cta.warps.size()) +
                  " to " + std::to_string(first + kWarps - 1));
    const WgmmaIssue issue{form, a.get(c, 0), b.get(c, 0), (p.get(c, 0) & 1) != 0};
    for (int lane = 1; lane < kLanes; ++lane) {
      if (a.get(c, lane) != issue.a || b.get(c, lane) != issue.b || (p.get(c, lane) & 1) != issue.accumulate)
        fail(c, "lanes 0 and " + std::to_string(lane) + " give different descriptors or scale-d");
    }
    if (issue.accumulate) check_defined(c, form->accumulators);
    check_defined(c, form->fragments);
    claim(c, *form);
    for (int index : form->accumulators) c.warp.defined[index] = kAllLanes;
    const Who who(c);
    for_shared_operands(c.cta, issue, who, [&](uint32_t offset) {
      hold_reads(c.cta, offset, kGranule, 1, &c.instruction, who);
      check_async_read(c.cta, offset, kGranule, who);
    });
    c.warp.wgmma.issues.push_back(issue);
    c.warp.wgmma.issued++;
    c.machine.events++;
    return Outcome::kNext;
  };
}

Handler wait_group(const Decoder& d) {
  d.expect_done();
  d.operands(1);
  const Operand& operand = d.operand(0);
  if (operand.kind != Operand::Kind::kInteger || operand.integer < 0) d.unknown("number of groups");
  const auto pending = static_cast<size_t>(std::min<int64_t>(operand.integer, kMostPending));
  return [pending](Context& c) {
    if (!whole_warp(c)) return Outcome::kBlocked;
    WgmmaState& state = c.warp.wgmma;
    if (state.commits.size() <= pending) return Outcome::kNext;
    const uint64_t needed = state.commits[state.commits.size() - pending - 1];
    if (state.done < needed) {
      c.warp.wait = {Wait::For::kWgmma, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    while (state.retired < needed) retire(c);
    state.commits.erase(state.commits.begin(), state.commits.end() - static_cast<std::ptrdiff_t>(pending));
    return Outcome::kNext;
  };
}

Handler fence(const Decoder& d) {
  d.expect_done();
  d.operands(0);
  return [](Context& c) {
    if (!whole_warp(c)) return Outcome::kBlocked;
    WgmmaState& state = c.warp.wgmma;
    state.fences++;
    cover_registers(c.warp);
    return Outcome::kNext;
  };
}

Handler commit_group(const Decoder& d) {
  d.expect_done();
  d.operands(0);
  return [](Context& c) {
    if (!whole_warp(c)) return Outcome::kBlocked;
    c.warp.wgmma.commits.push_back(c.warp.wgmma.issued);
    return Outcome::kNext;
  };
}

// A matrix of `rows` rows contiguous in K, from shared memory.
std::vector<uint8_t> gather(const Cta& cta, uint64_t descriptor, int rows, bool transposed, const Who& who) {
  std::vector<uint8_t> out(static_cast<size_t>(rows) * kOperandRowBytes);
  for_granules(cta, descriptor, rows, transposed, who, [&](int row, int byte, uint32_t offset) {
    uint8_t from[kGranule];
    async_read_shared(cta, offset, from, kGranule, who);
    uint8_t* to = out.data() + row * kOperandRowBytes + byte;
    if (!transposed) {
      std::memcpy(to, from, kGranule);
    } else {
      for (int i = 0; i < 8; ++i) std::memcpy(to + i * kOperandRowBytes, from + 2 * i, 2);
    }
  });
  return out;
}

std::vector<uint8_t> gather_fragments(Warp* warps, const std::vector<int>& registers) {
  std::vector<uint8_t> out(kRows * kOperandRowBytes);
  for (int w = 0; w < kWarps; ++w) {
    for (int r = 0; r < 4; ++r) {
      const uint64_t* lanes = warps[w].reg(registers[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = w * kWarpRows + a_row(lane, r);
        std::memcpy(&out[row * kOperandRowBytes + a_byte(lane, r)], &lanes[lane], 4);
      }
    }
  }
  return out;
}

// Calls f(element of D, the word that holds it, its shift) for each element of the accumulators of four warps.
template <class F>
void for_accumulators(Warp* warps, const WgmmaForm& form, std::vector<uint32_t>& d, F&& f) {
  const bool half = form.format.d == Result::kF16;
  for (int w = 0; w < kWarps; ++w) {
    for (int v = 0; v < form.n / 2; ++v) {
      uint32_t* words = &warps[w].wgmma.values[form.accumulators[half ? v / 2 : v] * kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        f(d[(w * kWarpRows + accumulator_row(lane, v)) * form.n + accumulator_column(lane, v)], words[lane],
          half ? v % 2 * 16 : 0);
    }
  }
}

void run(Cta& cta, Warp* warps, const WgmmaIssue& issue) {
  const WgmmaForm& form = *issue.form;
  const std::string who = describe(*form.instruction);
  const auto a = form.fragments.empty() ? gather(cta, issue.a, kRows, form.a_transposed, who + " A")
                                        : gather_fragments(warps, form.fragments);
  const auto b = gather(cta, issue.b, form.n, form.b_transposed, who + " B");
  const uint32_t mask = form.format.d == Result::kF16 ? 0xffff : 0xffffffff;
  std::vector<uint32_t> d(static_cast<size_t>(kRows) * form.n);
  for_accumulators(warps, form, d, [mask](uint32_t& x, uint32_t word, int shift) { x = word >> shift & mask; });
  multiply(form.format, kRows, form.n, kOperandRowBytes, a.data(), b.data(), issue.accumulate, d.data());
  for_accumulators(warps, form, d,
                   [mask](uint32_t x, uint32_t& word, int shift) { word = (word & ~(mask << shift)) | x << shift; });
  cta.grid->counters.wgmma_flops += 2ull * kRows * form.n * kOperandRowBytes / size_of(form.format.b);
}

}  // namespace

std::string WgmmaState::holder(const Code& code, int index) const {
  const auto uses = [index](const WgmmaIssue& issue) {
    const auto contains = [index](const std::vector<int>& all) {
      return std::find(all.begin(), all.end(), index) != all.end();
    };
    return contains(issue.form->accumulators) || contains(issue.form->fragments);
  };
  const auto found = std::find_if(issues.begin(), issues.end(), uses);
  const std::string line = found == issues.end() ? "" : " of line " + std::to_string(found->form->instruction->line);
  return "register " + code.register_name(index) + " is in use by the wgmma" + line + ", not waited for";
}

bool wgmma_advance(Machine& machine, Cta& cta, int first_warp) {
  Warp* warps = cta.warps.data() + first_warp;
  const auto behind = [&](int w) { return warps[w].wgmma.issued <= warps[w].wgmma.done; };
  const auto issue_of = [&](int w) -> const WgmmaIssue& {
    const WgmmaState& state = warps[w].wgmma;
    return state.issues[state.done - state.retired];
  };
  int ahead = 0;
  while (ahead < kWarps && behind(ahead)) ++ahead;
  if (ahead == kWarps) return false;
  const WgmmaIssue& issue = issue_of(ahead);
  const auto reject = [&](int w, const std::string& what) {
    throw Error(describe(*issue.form->instruction) + ": warp " + std::to_string(first_warp + w) + what + " warp " +
                std::to_string(first_warp + ahead) + " of its warpgroup");
  };
  for (int w = 0; w < kWarps; ++w) {
    if (behind(w)) {
      if (warps[w].live) return false;
      reject(w, " has exited without this wgmma, which was executed by");
    }
    const WgmmaIssue& other = issue_of(w);
    if (other.form == issue.form && other.a == issue.a && other.b == issue.b && other.accumulate == issue.accumulate)
      continue;
    reject(w, " executes " + describe(*other.form->instruction) + ", or with other descriptors or scale-d, than");
  }
  run(cta, warps, issue);
  for (int w = 0; w < kWarps; ++w) warps[w].wgmma.done++;
  machine.events++;
  return true;
}

Handler decode_wgmma(const Decoder& d) {
  if (d.instruction.opcode != "wgmma") return {};
  const std::string what = d.next();
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("wgmma");
  if (what == "mma_async") return mma(d);
  if (what == "wait_group") return wait_group(d);
  if (what == "commit_group") return commit_group(d);
  if (what == "fence") return fence(d);
  d.unknown("wgmma");
}

}  // namespace emulator
