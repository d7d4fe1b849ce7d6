// The numbers of PyTorch's generator on a CPU, and masks from them, for one instruction set: included
// by bernoulli.cpp through instruction_sets.h. Plain loops, for the compiler to make vectors of.

namespace METAKD_ISA {

// Mersenne Twister 19937 (Matsumoto and Nishimura 1998): the next NUMBERS words of its state, in place.
inline void twist(uint32_t* state) {
  constexpr int FAR = 397;
  const auto next = [](uint32_t here, uint32_t after, uint32_t far) __attribute__((always_inline)) {
    const uint32_t mixed = (here & 0x80000000u) | (after & 0x7fffffffu);
    return far ^ (mixed >> 1) ^ (-(after & 1u) & 0x9908b0dfu);
  };
  for (int i = 0; i < NUMBERS - FAR; ++i) state[i] = next(state[i], state[i + 1], state[i + FAR]);
  for (int i = NUMBERS - FAR; i < NUMBERS - 1; ++i)
    state[i] = next(state[i], state[i + 1], state[i + FAR - NUMBERS]);
  state[NUMBERS - 1] = next(state[NUMBERS - 1], state[0], state[FAR - 1]);
}

// What the generator gives for its state.
inline void temper(const uint32_t* state, uint32_t* drawn) {
  for (int i = 0; i < NUMBERS; ++i) {
    uint32_t y = state[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    drawn[i] = y ^ (y >> 18);
  }
}

// 1 where the number that PyTorch makes of two draws, 53 bits of them, is below the limit.
template <class Bits>
inline void compare(const uint32_t* drawn, uint64_t limit, Bits one, Bits* mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t pair;
    __builtin_memcpy(&pair, drawn + 2 * i, sizeof(pair));
    // The first draw is the higher half there, the lower in memory.
    const uint64_t number = (pair << 32 | pair >> 32) & ((1ull << 53) - 1);
    mask[i] = number < limit ? one : Bits{0};
  }
}

// Fill a mask and leave the generator where that many draws leave it.
template <class Bits>
void fill(Generator& generator, uint64_t limit, Bits one, void* to, int64_t count) {
  Bits* mask = static_cast<Bits*>(to);
  uint32_t drawn[NUMBERS + 2];  // what is left of the block before, then a block
  int64_t first = NUMBERS - generator.left, held = generator.left;
  temper(generator.state, drawn);
  while (true) {
    const int64_t now = held / 2 < count ? held / 2 : count;
    compare(drawn + first, limit, one, mask, now);
    mask += now;
    count -= now;
    first += 2 * now;
    held -= 2 * now;
    if (count == 0) break;
    // At most one draw is left, the first half of the next pair.
    if (held) drawn[0] = drawn[first];
    twist(generator.state);
    temper(generator.state, drawn + held);
    first = 0;
    held += NUMBERS;
  }
  generator.left = held;
}

inline void fill_as(Type type, Generator& generator, uint64_t limit, void* to, int64_t count) {
  switch (type) {
    case Type::float64: return fill<uint64_t>(generator, limit, 0x3ff0000000000000u, to, count);
    case Type::float32: return fill<uint32_t>(generator, limit, 0x3f800000u, to, count);
    case Type::bfloat16: return fill<uint16_t>(generator, limit, 0x3f80u, to, count);
    case Type::float16: return fill<uint16_t>(generator, limit, 0x3c00u, to, count);
  }
}

}  // namespace METAKD_ISA
