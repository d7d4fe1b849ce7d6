// bernoulli_ on the CPU: the mask that PyTorch's own makes, to the bit, in a tenth of the time. What
// metakd/training/dropout.py declares.

#include "cpu.h"

namespace {

constexpr int NUMBERS = 624;  // of a block of the Mersenne Twister

struct Generator {
  int64_t left;  // draws that the present block still has
  uint32_t state[NUMBERS];
};

#define METAKD_TEXT "bernoulli_draws.h"
#include "instruction_sets.h"

// at::CPUGeneratorImpl's state as torch.get_rng_state() gives it: PyTorch keeps it readable by every
// version, for checkpoints. What follows belongs to normal numbers.
struct Kept {
  uint64_t seed;
  int32_t left;  // one more than Generator's
  int32_t seeded;
  uint64_t next;
  uint64_t state[NUMBERS];
};

void bernoulli_(const Tensor& mask, const Tensor& state, double p) {
  STD_TORCH_CHECK(mask.is_contiguous() && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Byte &&
                      state.numel() >= static_cast<int64_t>(sizeof(Kept)),
                  "bernoulli_: a contiguous mask and the state of a generator expected");
  Kept kept;
  std::memcpy(&kept, state.const_data_ptr(), sizeof(kept));
  STD_TORCH_CHECK(kept.left >= 1 && kept.left <= NUMBERS && p >= 0 && p <= 1, "bernoulli_: state or p");
  Generator generator;
  generator.left = kept.left - 1;
  std::copy(kept.state, kept.state + NUMBERS, generator.state);
  // u < p for u = number / 2^53: exact, since p 2^53 is.
  const uint64_t limit = static_cast<uint64_t>(std::ceil(std::ldexp(p, 53)));
  METAKD_BEST(fill_as)(type_of(mask), generator, limit, mask.mutable_data_ptr(), mask.numel());
  kept.left = static_cast<int32_t>(generator.left + 1);
  kept.next = NUMBERS - generator.left;
  std::copy(generator.state, generator.state + NUMBERS, kept.state);
  std::memcpy(state.mutable_data_ptr(), &kept, sizeof(kept));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("bernoulli_", TORCH_BOX(&bernoulli_));
}
