// The statistics that a row's forward leaves for its backward: STATS of metakd/ops.py, in its order.
// Torch-free.

#pragma once

namespace metakd::soft_kl {

enum Stat : int { MAX_S, LSUM_S, MAX_T, LSUM_T, INNER, LSUM_1, SHIFT, STATS };

}  // namespace metakd::soft_kl
