// wgmma: issued by the four warps of a warpgroup, run some time later and in order, visible to a warp once it waits.
#include <bit>
#include <cmath>

#include "machine.h"

namespace emulator {
namespace {

constexpr int kStep = 32, kRows = 64;
constexpr int kFractionBits = 13;
constexpr uint64_t kPoison = 0x7fc0dead;
constexpr uint32_t kNan = 0x7fffffff;

// An e4m3 code: sign * significand / 8 * 2^exponent.
struct Code8 {
  int significand, exponent;
  bool nan;
};

constexpr Code8 decode_e4m3(uint8_t code) {
  const int field = code >> 3 & 15, fraction = code & 7;
  Code8 out{field ? 8 + fraction : fraction, field ? field - 7 : -6, (code & 0x7f) == 0x7f};
  if (code & 0x80) out.significand = -out.significand;
  return out;
}

constexpr auto kCodes = [] {
  std::array<Code8, 256> codes{};
  for (int i = 0; i < 256; ++i) codes[i] = decode_e4m3(static_cast<uint8_t>(i));
  return codes;
}();

// 32 products and the accumulator as one sum: every term cut toward zero to 13 bits below the largest exponent, the
// exact sum cut toward zero to 13 bits of fraction (MMA-Sim's model of Hopper).
uint32_t fused_sum(const uint8_t* a, const uint8_t* b, uint32_t acc_bits) {
  const float acc = std::bit_cast<float>(acc_bits);
  int largest = -10000, acc_exponent = 0;
  int64_t acc_significand = 0;
  if (!std::isfinite(acc)) return kNan;
  if (acc != 0) {
    acc_significand = acc_bits & 0x7fffff;
    const int field = acc_bits >> 23 & 255;
    if (field) acc_significand |= 0x800000;
    acc_exponent = field ? field - 127 : -126;
    largest = acc_exponent;
  }
  for (int k = 0; k < kStep; ++k) {
    const Code8 &x = kCodes[a[k]], &y = kCodes[b[k]];
    if (x.nan || y.nan) return kNan;
    if (x.significand && y.significand) largest = std::max(largest, x.exponent + y.exponent);
  }
  if (largest == -10000) return 0;
  int64_t sum = 0;
  const auto add = [&](int64_t significand, int fraction_bits, int exponent) {
    const int64_t magnitude = (significand < 0 ? -significand : significand) << kFractionBits;
    const int shift = std::min(fraction_bits + largest - exponent, 62);
    const int64_t kept = magnitude >> shift;
    sum += significand < 0 ? -kept : kept;
  };
  for (int k = 0; k < kStep; ++k) {
    const Code8 &x = kCodes[a[k]], &y = kCodes[b[k]];
    add(x.significand * y.significand, 6, x.exponent + y.exponent);
  }
  add(acc_bits >> 31 ? -acc_significand : acc_significand, 23, acc_exponent);
  uint64_t magnitude = sum < 0 ? -sum : sum;
  const int surplus = 64 - std::countl_zero(magnitude) - (kFractionBits + 1);
  if (surplus > 0) magnitude &= ~0ull << surplus;
  const double value = std::ldexp(static_cast<double>(magnitude), largest - kFractionBits);
  return std::bit_cast<uint32_t>(static_cast<float>(sum < 0 ? -value : value));
}

// Rows of 32 bytes that a K-major descriptor names.
std::vector<uint8_t> gather(const Cta& cta, uint64_t descriptor, int rows, const std::string& who) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  if (descriptor >> 49 & 7) throw Error(who + ": a matrix descriptor with a base offset is not emulated");
  if (mode == 0) throw Error(who + ": operands without swizzle are not emulated yet");
  const int log = 4 - mode;  // 128B is mode 1, 64B 2, 32B 3
  const uint32_t pitch = 16u << log, mask = (1u << log) - 1;
  std::vector<uint8_t> out(rows * kStep);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < kStep; k += 16) {
      const uint32_t linear = start + row % 8 * pitch + row / 8 * stride + k;
      const uint32_t offset = shared_offset(cta, linear ^ (((linear >> 7) & mask) << 4), 16, who);
      async_read_shared(cta, offset, out.data() + row * kStep + k, 16, who);
    }
  }
  return out;
}

// Row and column of register v of a thread's accumulator.
int row_of(int warp, int lane, int v) { return 16 * warp + lane / 4 + 8 * (v / 2 % 2); }
int column_of(int lane, int v) { return 8 * (v / 4) + 2 * (lane % 4) + v % 2; }

Handler mma(const Decoder& d) {
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("wgmma");
  const std::string shape = d.next();
  int n = 0;
  if (std::sscanf(shape.c_str(), "m64n%dk32", &n) != 1 || n < 8 || n > 256 || n % 8) d.unknown("shape");
  if (!(d.take("f32") && d.take("e4m3") && d.take("e4m3"))) d.unknown("type");
  d.expect_done();
  d.operands(6);
  WgmmaIssue issue{&d.instruction, {}, 0, 0, false, n};
  for (const Operand& element : d.operand(0).elements) issue.registers.push_back(d.destination(element));
  if (issue.registers.size() != static_cast<size_t>(n / 2)) d.unknown("number of accumulators");
  if (d.operand(4).integer != 1 || d.operand(5).integer != 1) d.unknown("negation");
  return [issue, a = d.source(1), b = d.source(2), p = d.source(3)](Context& c) {
    if (c.mask != kAllLanes) fail(c, "wgmma is executed by all lanes of a warp");
    WgmmaIssue mine = issue;
    mine.a = a.get(c, 0), mine.b = b.get(c, 0), mine.accumulate = p.get(c, 0) & 1;
    for (int lane = 1; lane < kLanes; ++lane) {
      if (a.get(c, lane) != mine.a || b.get(c, lane) != mine.b || ((p.get(c, lane) & 1) != 0) != mine.accumulate)
        fail(c, "lanes give different descriptors");
    }
    for (int index : mine.registers) {
      if (c.warp.in_flight[index]++ > 0) continue;
      if (!c.warp.wgmma_fenced) fail(c, "no wgmma.fence since other instructions could use the accumulators");
      // From here to the wait the registers belong to the tensor core: their readers find poison.
      auto& shadow = c.warp.shadow[index];
      uint64_t* registers = c.warp.reg(index);
      for (int lane = 0; lane < kLanes; ++lane)
        shadow[lane] = static_cast<uint32_t>(registers[lane]), registers[lane] = kPoison;
    }
    c.warp.wgmma.push_back(std::move(mine));
    c.warp.wgmma_issued++;
    c.machine.events++;
    return Outcome::kNext;
  };
}

Handler wait_group(const Decoder& d) {
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("wgmma");
  d.expect_done();
  const auto pending = static_cast<size_t>(d.operand(0).integer);
  return [=](Context& c) {
    Warp& warp = c.warp;
    if (warp.wgmma_commits.size() <= pending) return Outcome::kNext;
    const uint64_t needed = warp.wgmma_commits[warp.wgmma_commits.size() - pending - 1];
    if (warp.wgmma_done < needed) {
      warp.wait = {Wait::For::kWgmma, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    for (; warp.wgmma_retired < needed; warp.wgmma_retired++) {
      for (int index : warp.wgmma.front().registers) {
        if (--warp.in_flight[index] > 0) continue;
        uint64_t* registers = warp.reg(index);
        for (int lane = 0; lane < kLanes; ++lane) registers[lane] = warp.shadow[index][lane];
      }
      warp.wgmma.pop_front();
    }
    warp.wgmma_fenced = false;
    warp.wgmma_commits.erase(warp.wgmma_commits.begin(), warp.wgmma_commits.end() - pending);
    return Outcome::kNext;
  };
}

}  // namespace

bool wgmma_advance(Machine& machine, Cta& cta, int first_warp) {
  Warp* warps = cta.warps.data() + first_warp;
  for (int w = 0; w < 4; ++w) {
    if (warps[w].wgmma_issued <= warps[w].wgmma_done) return false;
  }
  const auto issue_of = [&](int w) -> const WgmmaIssue& {
    return warps[w].wgmma[warps[w].wgmma_done - warps[w].wgmma_retired];
  };
  const WgmmaIssue& issue = issue_of(0);
  const std::string who =
      "line " + std::to_string(issue.instruction->line) + ": " + issue.instruction->text.substr(0, 60);
  for (int w = 1; w < 4; ++w) {
    const WgmmaIssue& other = issue_of(w);
    if (other.instruction != issue.instruction || other.a != issue.a || other.b != issue.b ||
        other.accumulate != issue.accumulate)
      throw Error(who + ": the warps of a warpgroup issue different wgmma");
  }
  const auto a = gather(cta, issue.a, kRows, who), b = gather(cta, issue.b, issue.n, who);
  for (int w = 0; w < 4; ++w) {
    const auto& registers = issue_of(w).registers;
    for (int v = 0; v < issue.n / 2; ++v) {
      auto& shadow = warps[w].shadow[registers[v]];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t acc = issue.accumulate ? shadow[lane] : 0;
        shadow[lane] = fused_sum(&a[row_of(w, lane, v) * kStep], &b[column_of(lane, v) * kStep], acc);
      }
    }
  }
  for (int w = 0; w < 4; ++w) warps[w].wgmma_done++;
  cta.grid->counters.wgmma_flops += 2ull * kRows * issue.n * kStep;
  machine.events++;
  return true;
}

Handler decode_wgmma(const Decoder& d) {
  if (d.instruction.opcode != "wgmma") return {};
  if (d.take("mma_async")) return mma(d);
  if (d.take("wait_group")) return wait_group(d);
  const bool commit = d.take("commit_group");
  if (!commit && !d.take("fence")) d.unknown("wgmma");
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("wgmma");
  d.expect_done();
  return [commit](Context& c) {
    if (c.mask != c.warp.live) fail(c, "wgmma is executed by whole warps");
    if (commit)
      c.warp.wgmma_commits.push_back(c.warp.wgmma_issued);
    else
      c.warp.wgmma_fenced = true;
    return Outcome::kNext;
  };
}

}  // namespace emulator
