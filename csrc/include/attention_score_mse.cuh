// CUDA kernels of attention_score_mse: see metakd/ops.py for the contract. Torch-free: launchers are in
// cuda/attention_score_mse.cu, and a compiler or a host program can take this file alone.
//
// With masked rows set to zero, a head's sum of squared differences of scores is, for the unscaled
// Q = [Q_s | Q_t], K = [K_s | K_t] and G(X) = X^T X,
//     c_s^2 <G(Q)_ss, G(K)_ss> - 2 c_s c_t <G(Q)_st, G(K)_st> + c_t^2 <G(Q)_tt, G(K)_tt>,
// and the gradients are dQ_s = 2 c_s (c_s Q_s G(K)_ss - c_t Q_t G(K)_ts), dK_s likewise: a row times a
// matrix of W x D_s. Two kernels.
//
// forward: a block a head. Rows of both roles (queries, keys) and both models pass once through shared
//   memory, in up to three stages of 64 tokens; each warp sums a 32 x 32 tile of the upper triangle of
//   G(Q) and the same tile of G(K) in its registers, so that their inner product needs no exchange. Then
//   one thread has the value, both norms and the guard's verdict. A head under the guard is computed by
//   differences of scores in the same block, 64 x 64 of them at a time. With guard = inf every head is, by
//   a block for 512 of its queries; the last of these adds up what they stored.
// backward: a block a head, role and up to 512 of its rows, which need nothing of other rows: rows times
//   the Gram matrix of the other role, or, for heads under the guard, times the other role's rows, through
//   the differences of scores. Queries and keys are the same code with roles exchanged.
//
// Why stages and not whole heads: the rows of a head at L = 512, D 26 and 64 in half precision are 184 KB,
// which would leave a multiprocessor one block that computes nothing while it loads. Stages of 23 KB (as
// much as 64 tokens have) leave room for two blocks with two stages under way in each, 92 KB of traffic,
// three times what memory's latency asks for (33 bytes a ns, about a microsecond); any L is served, and
// nothing is read twice up to 12 tiles (D_s + D_t <= 128; beyond that a pass is made per 12 tiles). Bulk
// copies would save instructions, but want rows of a multiple of 16 bytes, and 26 elements are 52.
//
// Bytes moved for a head: 2 L W elements forward; 2 L W + 2 L D_s backward; Gram matrices are 8 W D_s bytes
// and stay in the L2. Work at D 26 and 64, padded to 32 and 64: 6 tiles x 2 roles x 2 x 32 x 32 x L flops
// forward, 13 Mflop at L = 512; backward 3 pieces x 2 roles x 2 x 96 x 32 x L, 19 Mflop.
//
// Loads are asynchronous copies of 16, 8 or 4 bytes, whatever a row's address and length allow (heads of
// 26 elements begin at any multiple of 4 bytes); a masked row's copy writes zeros and reads nothing. Odd
// addresses and mixed dtypes are loaded element by element.
//
// Precision: products are exact or in float32 (doubles where an input is) and summed in float32, in full;
// what is not exact in half precision goes in pieces (warp_tile.cuh). So Gram matrices lose nothing that
// float32 has.
//
// Order of sums: fixed by the place of a row in its head; no float atomics. Same input, same bits, and
// masked rows at the end of all sequences change no bit.
//
// Legend: B batch, A heads, L length, D_s and D_t head sizes, W = D_s + D_t; _s student, _t teacher; c
// scales. C: the type of elements in shared memory; A (of templates): the type computed in.

#pragma once

#include <initializer_list>

#include <warp_tile.cuh>

namespace metakd::attention_score_mse {

constexpr int MOST_LAYERS = 16, MOST_SIZE = 128;  // layers of a launch, D
constexpr int MOST_WARPS = 12, MOST_BACKWARD_WARPS = 8;
constexpr int MOST_TILES = 36;    // of 8 x 8 tiles, on or above the diagonal
constexpr int MOST_ROWS = 128;    // of a stage
constexpr int CHUNK_ROWS = 512;   // of a block, unless it sums Gram matrices
constexpr int FLAG_SETS = 4;      // of stages, see stream()

enum Role : int { QUERY, KEY };
enum Model : int { STUDENT, TEACHER };

// [B, A, L, D], neighbours in D adjacent; strides in elements.
struct Heads {
  void* data;
  int64_t stride_b, stride_a, stride_l;
};

struct Layer {
  Heads of[2][2];  // [role][model]
  Heads grad[2];   // [role], of the student
};

// How a kernel uses its shared memory.
struct Plan {
  int rows = 0;    // of a stage, and edge of a block of scores
  int stages = 0;
  int panel = 0;   // 32-column parts of the Gram matrix that the backward holds at a time
  int bytes = 0;   // 0: does not fit
};

template <typename A>
struct Job {
  Layer layers[MOST_LAYERS];
  const bool* mask[2];                       // [role]: [B, L] or null
  int64_t mask_stride_b[2], mask_stride_l[2];
  A *heads, *gram;                           // [n, B, A], [n, B, A, 2, W, D_s]
  bool* tiled;                               // [n, B, A]
  A* sums;                                   // [n, B, A, chunks], for a forward by tiles in chunks
  int* tickets;                              // [n, B, A], zeros, likewise
  const A *norm_t, *dheads;                  // [n, B, A]; norm_t may be null
  int64_t dheads_stride[3];
  int64_t length;
  int batch, heads_count;                    // B, A
  int size[2];                               // [model]: D_s, D_t
  Dtype dtype[2];
  A scale[2], guard;
  // [role]: how many positions before its own a row meets rows of the other role, after its own they are
  // reach[1 - role]: of queries `before`, of keys `after`. At most length.
  int reach[2];
  bool gram_form;                            // false: every head by tiles
  Plan plan;

  METAKD_BOTH bool meets_all() const { return reach[0] >= length && reach[1] >= length; }
  METAKD_BOTH int chunks() const { return static_cast<int>((length + CHUNK_ROWS - 1) / CHUNK_ROWS); }
  // Blocks of a head in the forward; more than one need `sums` and `tickets`.
  METAKD_BOTH int forward_chunks() const { return gram_form || length == 0 ? 1 : chunks(); }
  METAKD_BOTH int parts(int model) const { return (size[model] + TILE - 1) / TILE; }
  // Tiles of a Gram matrix that are computed: those on or above the diagonal, without the teacher's
  // where norm_t is given.
  METAKD_BOTH int tiles() const {
    const int s = parts(STUDENT), t = parts(TEACHER);
    return s * (s + 1) / 2 + s * t + (norm_t ? 0 : t * (t + 1) / 2);
  }
};

// Rows of a role in shared memory: all of the student's, then all of the teacher's.
template <typename C>
struct Panel {
  int rows, stride_s, stride_t;

  template <typename A>
  METAKD_BOTH Panel(const Job<A>& job, int rows_)
      : rows(rows_),
        stride_s(TILE * job.parts(STUDENT) + PADDING<C>),
        stride_t(TILE * job.parts(TEACHER) + PADDING<C>) {}

  METAKD_BOTH int elements() const { return rows * (stride_s + stride_t); }
  METAKD_BOTH int stride(int model) const { return model == STUDENT ? stride_s : stride_t; }
  METAKD_BOTH int begin(int model) const { return model == STUDENT ? 0 : rows * stride_s; }
};

// Rows of a role and model as they are loaded.
struct Source {
  const char* rows;      // the first of the head
  int64_t step;          // bytes from row to row
  int width;             // bytes of a copy; 0: element by element
  int parts, log_lanes;  // copies or elements of a row, and threads for them
};

template <typename A>
struct Shared {
  Source sources[2][2];
  A of_tiles[MOST_TILES], of_warps[MOST_WARPS];
  A inverse[2 * MOST_SIZE / TILE * MOST_SIZE / TILE];  // of tiles in pieces
  uint8_t real[FLAG_SETS][MOST_ROWS], resident[MOST_ROWS];
  bool tiled;
};

constexpr int rounded_up(int x, int to) { return (x + to - 1) / to * to; }

template <typename A>
constexpr int SHARED_HEAD = rounded_up(sizeof(Shared<A>), 128);

// Elements of a block's differences of scores, in pieces.
template <typename C>
METAKD_BOTH int differences(int rows) {
  return TWO_PIECES<C> * rows * (rows + PADDING<C>);
}

// Of the Gram matrix: 32-column parts of all its rows, in pieces.
template <typename C, typename A>
METAKD_BOTH int gram_rows(const Job<A>& job) {
  return TILE * (job.parts(STUDENT) + job.parts(TEACHER));
}

// `limit`: shared memory that a block may have. Half of it, with the KB that each block costs besides,
// lets a multiprocessor have two blocks; less than two stages are not worth that.
template <typename Bytes>
Plan first_that_fits(int limit, int panels, std::initializer_list<int> heights, Bytes bytes_of) {
  for (const bool two : {true, false})
    for (int panel = panels; panel > 0; --panel)
      for (int stages = 3; stages > (two ? 1 : 0); --stages)
        for (const int rows : heights) {
          const int bytes = bytes_of(rows, stages, panel);
          if (bytes <= (two ? limit / 2 - 512 : limit)) return {rows, stages, panel, bytes};
        }
  return {};
}

METAKD_BOTH int edge_of(int rows) { return rows < 64 ? rows : 64; }

template <typename C, typename A>
Plan forward_plan(const Job<A>& job, int limit) {
  return first_that_fits(limit, 1, {64, 32}, [&](int rows, int stages, int) {
    const int panels = job.gram_form ? 2 * stages : 1 + stages;
    return SHARED_HEAD<A> + panels * Panel<C>(job, rows).elements() * int{sizeof(C)};
  });
}

template <typename C, typename A>
Plan backward_plan(const Job<A>& job, int limit) {
  return first_that_fits(limit, job.parts(STUDENT), {128, 64, 32}, [&](int rows, int stages, int panel) {
    const int edge = edge_of(rows);
    const int by_tiles = differences<C>(edge) + (1 + stages) * Panel<C>(job, edge).elements();
    const int by_gram = FULL_PIECES<C> * gram_rows<C>(job) * (TILE * panel + PADDING<C>) +
        stages * Panel<C>(job, rows).elements();
    return SHARED_HEAD<A> + (job.gram_form && by_gram > by_tiles ? by_gram : by_tiles) * int{sizeof(C)};
  });
}

// Warps of the forward: a tile of the Gram matrix each if possible, else as evenly as it goes.
template <typename A>
int forward_warps(const Job<A>& job) {
  const int tiles = job.gram_form ? job.tiles() : 1, passes = (tiles + MOST_WARPS - 1) / MOST_WARPS;
  const int warps = (tiles + passes - 1) / passes;
  return warps < 4 ? 4 : warps;
}

// Of the backward: as many as a block of 64 rows has tiles of the gradient.
template <typename A>
int backward_warps(const Job<A>& job) {
  return job.parts(STUDENT) > 2 ? MOST_BACKWARD_WARPS : MOST_BACKWARD_WARPS / 2;
}

// A block's head

// Whether a row is real, by role.
struct Flags {
  uint8_t of[2];

  // A bit a role.
  METAKD_BOTH uint8_t bits() const { return static_cast<uint8_t>((of[QUERY] != 0) | (of[KEY] != 0) << 1); }
};

template <typename A>
struct Head {
  const Job<A>& job;
  int64_t index;  // of [n, B, A]
  int layer, b, a;

  METAKD_BOTH Head(const Job<A>& job_, int64_t index_) : job(job_), index(index_) {
    a = static_cast<int>(index % job.heads_count);
    const int64_t examples = index / job.heads_count;
    b = static_cast<int>(examples % job.batch);
    layer = static_cast<int>(examples / job.batch);
  }

  // First row of a role and model.
  METAKD_BOTH char* rows(const Heads& heads, int model) const {
    return static_cast<char*>(heads.data) +
        (b * heads.stride_b + a * heads.stride_a) * bytes_of(job.dtype[model]);
  }

  // A row's masks as they lie in memory: what is made of them waits for the load.
  METAKD_BOTH Flags flags(int64_t row) const {
    Flags flags = {{0, 0}};
    if (row >= job.length) return flags;
    for (int role = 0; role < 2; ++role)
      flags.of[role] = job.mask[role]
          ? static_cast<uint8_t>(job.mask[role][b * job.mask_stride_b[role] + row * job.mask_stride_l[role]])
          : uint8_t(1);
    return flags;
  }
};

// Loading

template <typename C>
METAKD_BOTH bool is_of(Dtype dtype) {
  if constexpr (std::is_same_v<C, __nv_bfloat16>) return dtype == Dtype::bfloat16;
  else if constexpr (on_tensor_cores<C>) return dtype == Dtype::float16;
  else return dtype == (sizeof(C) == 8 ? Dtype::float64 : Dtype::float32);
}

// Parts of rows among threads: neighbouring parts in neighbouring threads, 2^log_lanes to a row.
struct Spread {
  int lanes, row, part, step;  // of this thread, the first; rows from one to the next

  METAKD_DEVICE explicit Spread(int log_lanes)
      : lanes(1 << log_lanes),
        row(threadIdx.x >> log_lanes),
        part(threadIdx.x & (lanes - 1)),
        step(blockDim.x >> log_lanes) {}

  static METAKD_DEVICE int log_lanes_for(int parts) {
    int log_lanes = 5;
    while (log_lanes > 0 && 1 << (log_lanes - 1) >= parts) --log_lanes;
    return log_lanes;
  }
};

// Finds out once how a block loads rows; ends with a barrier.
template <typename C, typename A>
METAKD_DEVICE void find_sources(const Head<A>& head, Shared<A>& shared) {
  const Job<A>& job = head.job;
  if (threadIdx.x < 4) {
    const int role = threadIdx.x / 2, model = threadIdx.x % 2;
    const Heads& heads = job.layers[head.layer].of[role][model];
    const Dtype dtype = job.dtype[model];
    Source& source = shared.sources[role][model];
    source.rows = head.rows(heads, model);
    source.step = heads.stride_l * bytes_of(dtype);
    const int bytes = job.size[model] * bytes_of(dtype);
    const uint64_t bits =
        reinterpret_cast<uint64_t>(source.rows) | static_cast<uint64_t>(source.step) | static_cast<uint64_t>(bytes);
    source.width = !is_of<C>(dtype) ? 0 : bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
    source.parts = source.width == 0 ? job.size[model] : bytes / source.width;
    source.log_lanes = Spread::log_lanes_for(source.parts);
  }
  block_sync();
}

template <int BYTES>
METAKD_DEVICE void copy_rows(char* to, int stride, const Source& source, int role, int64_t first, int rows,
                             const uint8_t* real) {
  const Spread spread(source.log_lanes);
  const int64_t step = spread.step * source.step;
  for (int part = spread.part; part < source.parts; part += spread.lanes) {
    const char* from = source.rows + (first + spread.row) * source.step + part * BYTES;
    char* place = to + spread.row * stride + part * BYTES;
#pragma unroll 2
    for (int row = spread.row; row < rows; row += spread.step) {
      copy_async<BYTES>(place, from, (real[row] >> role & 1) != 0);
      from += step;
      place += spread.step * stride;
    }
  }
}

// Starts loading a panel's rows from row `first`; what is not real becomes zero.
template <typename C, typename A>
METAKD_DEVICE void load_panel(C* to, const Panel<C>& panel, const Head<A>& head, const Shared<A>& shared, int role,
                              int64_t first, const uint8_t* real) {
#pragma unroll 1
  for (int model = 0; model < 2; ++model) {
    const Source source = shared.sources[role][model];
    C* const place = to + panel.begin(model);
    const int stride = panel.stride(model);
    const auto copy = [&](auto width) {
      copy_rows<width()>(reinterpret_cast<char*>(place), stride * static_cast<int>(sizeof(C)), source, role, first,
                         panel.rows, real);
    };
    switch (source.width) {
      case 16: copy(std::integral_constant<int, 16>()); break;
      case 8: copy(std::integral_constant<int, 8>()); break;
      case 4: copy(std::integral_constant<int, 4>()); break;
      default: {
        const Dtype dtype = head.job.dtype[model];
        const Spread spread(source.log_lanes);
        for (int row = spread.row; row < panel.rows; row += spread.step) {
          const bool is_real = real[row] >> role & 1;
          const Row<Any> from = {const_cast<char*>(source.rows) + (first + row) * source.step, dtype};
          for (int column = spread.part; column < source.parts; column += spread.lanes)
            place[row * stride + column] = rounded_to<C>(is_real ? load_one<Any, A>(from, column) : A(0));
        }
      }
    }
  }
}

// Zeros in the columns that pad `panels` panels to whole tiles: loads leave them alone.
template <typename C, typename A>
METAKD_DEVICE void clear_padding(C* to, const Panel<C>& panel, int panels, const Job<A>& job) {
  for (int model = 0; model < 2; ++model) {
    const int size = job.size[model], stride = panel.stride(model);
    const int padding = TILE * job.parts(model) - size;
    const Spread spread(Spread::log_lanes_for(padding));
    for (int row = spread.row; row < panels * panel.rows; row += spread.step) {
      C* const place = to + row / panel.rows * panel.elements() + panel.begin(model) + row % panel.rows * stride;
      if (spread.part < padding) place[size + spread.part] = rounded_to<C>(A(0));
    }
  }
}

// Stages: `use(i, slot)` for blocks of `rows` rows from..to - 1, each after `load(i, slot, real)` of it,
// which was called stages - 1 blocks before. Flags of block i are in shared.real[i % FLAG_SETS]; they are
// asked for one block earlier still.
template <typename A, typename Load, typename Use>
METAKD_DEVICE void stream(const Head<A>& head, Shared<A>& shared, int rows, int stages, int from, int to, Load load,
                          Use use) {
  const int thread = threadIdx.x, ahead = stages - 1;
  const auto flags = [&](int i) {
    return thread < rows && i < to ? head.flags(static_cast<int64_t>(i) * rows + thread) : Flags{{0, 0}};
  };
  Flags next = flags(from);
  int coming_slot = 0, slot = 0;
  for (int i = from - ahead; i < to; ++i) {
    const int coming = i + ahead;
    uint8_t* const real = shared.real[coming % FLAG_SETS];
    if (thread < rows) real[thread] = next.bits();
    if (i >= from && ahead == 2) copies_wait<1>();
    else if (i >= from) copies_wait<0>();
    // Block i is here, and all are through with block i - 1, whose place the coming one takes.
    block_sync();
    next = flags(coming + 1);
    if (coming < to) load(coming, coming_slot, real);
    copies_commit();
    if (++coming_slot == stages) coming_slot = 0;
    if (ahead == 0) {
      copies_wait<0>();
      block_sync();
    }
    if (i < from) continue;
    use(i, slot);
    if (++slot == stages) slot = 0;
  }
  block_sync();
}

// Differences of scores

// Rows of one role against rows of the other, both in shared memory.
template <typename C, typename A>
struct Scores {
  const Job<A>& job;
  const Panel<C>& panel;
  int role;  // of the rows; columns are of the other
  const C *rows, *columns;
  const uint8_t *real_rows, *real_columns;
  int64_t first_row, first_column;

  METAKD_DEVICE bool sees(int row, int column) const {
    if (!(real_rows[row] >> role & 1) || !(real_columns[column] >> (1 - role) & 1)) return false;
    if (job.meets_all()) return true;
    const int gap = static_cast<int>(first_row - first_column) + row - column;
    return gap <= job.reach[role] && -gap <= job.reach[1 - role];
  }

  // Tile (i, j) of them; 0 where a query does not see a key. The teacher's products are added to the
  // student's, times -c_s / c_t: what comes out small is small before the last roundings.
  METAKD_DEVICE Tile<A> difference(int i, int j) const {
    Tile<A> gap;
#pragma unroll 1
    for (int model = 0; model < 2; ++model) {
      const int begin = panel.begin(model), stride = panel.stride(model);
      multiply<Lies::by_row, Lies::by_column>(gap, rows + begin + TILE * i * stride, stride,
                                              columns + begin + TILE * j * stride, stride,
                                              rounded_up(job.size[model], 16));
      if (model == STUDENT) gap.scale(-job.scale[STUDENT] / job.scale[TEACHER]);
    }
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < TILE; ++e) {
      const bool seen = sees(TILE * i + Tile<A>::row(e, lane), TILE * j + Tile<A>::column(e, lane));
      gap.at[e] = seen ? -job.scale[TEACHER] * gap.at[e] : A(0);
    }
    return gap;
  }
};

// Blocks of `edge` columns that rows of block i may meet.
template <typename A>
METAKD_BOTH void columns_for(const Job<A>& job, int role, int i, int edge, int& from, int& to) {
  const int64_t first = static_cast<int64_t>(i) * edge, low = first - job.reach[role];
  const int64_t next = first + edge + job.reach[1 - role];
  from = low > 0 ? static_cast<int>(low / edge) : 0;
  to = static_cast<int>(((next < job.length ? next : job.length) + edge - 1) / edge);
}

// Starts loading rows that stay; whoever waits for copies that were started later has them, too.
template <typename C, typename A>
METAKD_DEVICE void load_resident(C* to, const Panel<C>& panel, const Head<A>& head, int role, int64_t first,
                                 Shared<A>& shared) {
  const int thread = threadIdx.x;
  if (thread < panel.rows) shared.resident[thread] = head.flags(first + thread).bits();
  block_sync();
  load_panel(to, panel, head, shared, role, first, shared.resident);
  copies_commit();
}

// forward

// The value of rows [first, last) of a head by tiles; thread 0 has it.
template <typename C, typename A>
METAKD_DEVICE A sum_over_tiles(const Head<A>& head, Shared<A>& shared, C* memory, int64_t first, int64_t last) {
  const Job<A>& job = head.job;
  const int edge = edge_of(job.plan.rows), tiles = edge / TILE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Panel<C> panel(job, edge);
  C* const stages = memory + panel.elements();
  clear_padding(memory, panel, 1 + job.plan.stages, job);
  A total = 0;
  for (int i = static_cast<int>(first / edge); i < static_cast<int>((last + edge - 1) / edge); ++i) {
    const int64_t first_row = static_cast<int64_t>(i) * edge;
    load_resident(memory, panel, head, QUERY, first_row, shared);
    A of_rows = 0;  // short sums, so that few roundings pile up
    int from, to;
    columns_for(job, QUERY, i, edge, from, to);
    stream(
        head, shared, edge, job.plan.stages, from, to,
        [&](int j, int slot, const uint8_t* real) {
          load_panel(stages + slot * panel.elements(), panel, head, shared, KEY, static_cast<int64_t>(j) * edge, real);
        },
        [&](int j, int slot) {
          const Scores<C, A> scores = {job, panel, QUERY, memory, stages + slot * panel.elements(),
                                       shared.resident, shared.real[j % FLAG_SETS], first_row,
                                       static_cast<int64_t>(j) * edge};
          for (int tile = warp; tile < tiles * tiles; tile += warps) {
            const Tile<A> gap = scores.difference(tile % tiles, tile / tiles);
            A sum = 0;
#pragma unroll
            for (int e = 0; e < TILE; ++e) sum += gap.at[e] * gap.at[e];
            of_rows += sum;
          }
        });
    total += of_rows;
  }
  total = warp_sum(total);
  if (lane == 0) shared.of_warps[warp] = total;
  block_sync();
  if (threadIdx.x != 0) return 0;
  A sum = 0;
  for (int i = 0; i < warps; ++i) sum += shared.of_warps[i];
  return sum;
}

// Where a 32-column part of both models' columns is: the model, and the part of it.
template <typename A>
METAKD_BOTH int model_of(const Job<A>& job, int part, int& of_model) {
  const int s = job.parts(STUDENT);
  of_model = part < s ? part : part - s;
  return part < s ? STUDENT : TEACHER;
}

// Tile (i, j), i <= j, number `index` of the upper triangle row by row; false if there is none.
template <typename A>
METAKD_BOTH bool tile_at(const Job<A>& job, int index, int& i, int& j) {
  if (index >= job.tiles()) return false;
  const int parts = job.parts(STUDENT) + job.parts(TEACHER);
  for (i = 0; index >= parts - i; ++i) index -= parts - i;
  j = i + index;
  return true;
}

// A tile of a Gram matrix goes where the student's columns are kept, and so does its mirror image.
template <typename A>
METAKD_DEVICE void write_gram(const Head<A>& head, int role, const Tile<A>& tile, int i, int j) {
  const Job<A>& job = head.job;
  const int lane = threadIdx.x % 32, width = job.size[STUDENT] + job.size[TEACHER];
  int part_i, part_j;
  if (model_of(job, i, part_i) == TEACHER) return;
  const int model = model_of(job, j, part_j);
  A* const gram = job.gram + (head.index * 2 + role) * width * job.size[STUDENT];
  const A scale = role == KEY       ? A(1)
      : model == STUDENT ? job.scale[STUDENT] * job.scale[STUDENT]
                         : -job.scale[STUDENT] * job.scale[TEACHER];
#pragma unroll
  for (int e = 0; e < TILE; ++e) {
    const int row = TILE * part_i + Tile<A>::row(e, lane), column = TILE * part_j + Tile<A>::column(e, lane);
    if (row >= job.size[STUDENT] || column >= job.size[model]) continue;
    const A x = scale * tile.at[e];
    gram[((model == TEACHER ? job.size[STUDENT] : 0) + column) * job.size[STUDENT] + row] = x;
    if (model == STUDENT && i != j) gram[row * job.size[STUDENT] + column] = x;
  }
}

template <typename C, typename A>
METAKD_DEVICE void sum_gram(const Head<A>& head, Shared<A>& shared, C* memory) {
  const Job<A>& job = head.job;
  const Panel<C> panel(job, job.plan.rows);
  const int rows = panel.rows, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int blocks = static_cast<int>((job.length + rows - 1) / rows);
  clear_padding(memory, panel, 2 * job.plan.stages, job);
  for (int first_tile = 0; first_tile < job.tiles(); first_tile += warps) {
    int i = 0, j = 0;
    const bool has_tile = tile_at(job, first_tile + warp, i, j);
    int part_i, part_j;
    const int model_i = model_of(job, i, part_i), model_j = model_of(job, j, part_j);
    const int begin_i = panel.begin(model_i) + TILE * part_i, stride_i = panel.stride(model_i);
    const int begin_j = panel.begin(model_j) + TILE * part_j, stride_j = panel.stride(model_j);
    Tile<A> of[2];
    stream(
        head, shared, rows, job.plan.stages, 0, blocks,
        [&](int block, int slot, const uint8_t* real) {
          for (int role = 0; role < 2; ++role)
            load_panel(memory + (2 * slot + role) * panel.elements(), panel, head, shared, role,
                       static_cast<int64_t>(block) * rows, real);
        },
        [&](int, int slot) {
          if (!has_tile) return;
#pragma unroll
          for (int role = 0; role < 2; ++role) {
            const C* const x = memory + (2 * slot + role) * panel.elements();
            Tile<A> product;
            multiply<Lies::by_column, Lies::by_row>(product, x + begin_i, stride_i, x + begin_j, stride_j, rows);
            of[role].add(product);
          }
        });
    if (!has_tile) continue;
    A inner = 0;
#pragma unroll
    for (int e = 0; e < TILE; ++e) inner += of[QUERY].at[e] * of[KEY].at[e];
    inner = warp_sum(inner);
    if (lane == 0) shared.of_tiles[first_tile + warp] = inner;
#pragma unroll
    for (int role = 0; role < 2; ++role) write_gram(head, role, of[role], i, j);
  }
  block_sync();
}

// From the inner products of tiles; by thread 0.
template <typename A>
METAKD_DEVICE A gram_value(const Head<A>& head, const Shared<A>& shared, bool& tiled) {
  const Job<A>& job = head.job;
  const int student = job.parts(STUDENT);
  A ss = 0, st = 0, tt = 0;
  for (int index = 0, i, j; tile_at(job, index, i, j); ++index) {
    const A x = i == j ? shared.of_tiles[index] : 2 * shared.of_tiles[index];
    (j < student ? ss : i < student ? st : tt) += x;
  }
  ss *= job.scale[STUDENT] * job.scale[STUDENT];
  st *= job.scale[STUDENT] * job.scale[TEACHER];  // twice the product: its mirror image is counted
  tt = job.norm_t ? job.norm_t[head.index] : tt * job.scale[TEACHER] * job.scale[TEACHER];
  const A value = ss - st + tt;
  tiled = job.guard > 0 && value < job.guard * (ss + tt);  // not if it is NaN
  return value;
}

// gridDim.x = heads x forward_chunks().
template <typename C, typename A = Sum<C>>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1)
    attention_score_mse_forward(const __grid_constant__ Job<A> job) {
  auto& shared = *reinterpret_cast<Shared<A>*>(dynamic_shared());
  C* const memory = reinterpret_cast<C*>(dynamic_shared() + SHARED_HEAD<A>);
  const int chunks = job.forward_chunks(), chunk = static_cast<int>(blockIdx.x % chunks);
  const Head<A> head(job, blockIdx.x / chunks);
  const bool is_first = threadIdx.x == 0;
  find_sources<C>(head, shared);
  if (job.gram_form) {
    sum_gram(head, shared, memory);
    if (is_first) job.heads[head.index] = gram_value(head, shared, shared.tiled);
  } else if (is_first) {
    shared.tiled = true;
  }
  if (is_first && chunk == 0) job.tiled[head.index] = shared.tiled;
  block_sync();
  if (!shared.tiled) return;
  const int64_t first = static_cast<int64_t>(chunk) * CHUNK_ROWS, next = first + CHUNK_ROWS;
  const A value = sum_over_tiles(head, shared, memory, first, chunks > 1 && next < job.length ? next : job.length);
  if (!is_first) return;
  if (chunks == 1) {
    job.heads[head.index] = value;
    return;
  }
  A* const sums = job.sums + head.index * chunks;
  sums[chunk] = value;
  if (!is_last_block(job.tickets + head.index, chunks)) return;
  A total = 0;
  for (int i = 0; i < chunks; ++i) total += load_other(sums + i);
  job.heads[head.index] = total;
}

// backward

// Writes two neighbours of a row, or one.
template <typename C, typename A>
METAKD_DEVICE void store_pair(char* row, Dtype dtype, int column, A x, A y, bool both) {
  if constexpr (on_tensor_cores<C>) {
    C* const at = reinterpret_cast<C*>(row) + column;
    if (both && (reinterpret_cast<uint64_t>(at) & 3) == 0) {
      *reinterpret_cast<uint32_t*>(at) = narrow_two<C>(x, y);
    } else {
      at[0] = rounded_to<C>(x);
      if (both) at[1] = rounded_to<C>(y);
    }
  } else {
    const Row<Any> out = {row, dtype};
    store_one<Any, A>(out, column, x);
    if (both) store_one<Any, A>(out, column + 1, y);
  }
}

// Writes a tile of a gradient times `factor`: 32 rows from `row` of those from `first` on, whose flags are
// `real`; part `part` of the student's columns.
template <typename C, typename A>
METAKD_DEVICE void write_gradient(const Head<A>& head, int role, const Tile<A>& tile, A factor, int64_t first, int row,
                                  int part, const uint8_t* real) {
  const Job<A>& job = head.job;
  const Heads& heads = job.layers[head.layer].grad[role];
  const Dtype dtype = job.dtype[STUDENT];
  const int lane = threadIdx.x % 32, size = job.size[STUDENT];
  const int64_t step = heads.stride_l * bytes_of(dtype);
  char* const to = head.rows(heads, STUDENT) + first * step;
#pragma unroll
  for (int e = 0; e < TILE; e += 2) {
    const int at = row + Tile<A>::row(e, lane), column = TILE * part + Tile<A>::column(e, lane);
    if (first + at >= job.length || column >= size) continue;
    const bool is_real = real[at] >> role & 1;
    store_pair<C>(to + at * step, dtype, column, is_real ? factor * tile.at[e] : A(0),
                  is_real ? factor * tile.at[e + 1] : A(0), column + 1 < size);
  }
}

// Rows [first, last) times the other role's Gram matrix.
template <typename C, typename A>
METAKD_DEVICE void multiply_by_gram(const Head<A>& head, Shared<A>& shared, C* memory, int role, A factor,
                                    int64_t first, int64_t last) {
  const Job<A>& job = head.job;
  const Panel<C> panel(job, job.plan.rows);
  const int rows = panel.rows, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int size = job.size[STUDENT], width = size + job.size[TEACHER];
  const int parts = job.parts(STUDENT) + job.parts(TEACHER), held = job.plan.panel;
  const int stride = TILE * held + PADDING<C>, apart = gram_rows<C>(job) * stride;
  C* const stages = memory + FULL_PIECES<C> * apart;
  const A* const gram = job.gram + (head.index * 2 + 1 - role) * width * size;
  clear_padding(stages, panel, job.plan.stages, job);
  for (int first_part = 0; first_part < job.parts(STUDENT); first_part += held) {
    const int count = job.parts(STUDENT) - first_part < held ? job.parts(STUDENT) - first_part : held;
    // stream() begins with a barrier before the first use, and ends with one after the last.
    for (int index = warp; index < parts * count; index += warps) {
      const int i = index % parts, j = index / parts;
      int part;
      const int model = model_of(job, i, part);
      const A scale = role == KEY ? A(1) : model == STUDENT ? job.scale[STUDENT] : -job.scale[TEACHER];
      Tile<A> tile;
#pragma unroll
      for (int e = 0; e < TILE; ++e) {
        const int row = TILE * part + Tile<A>::row(e, lane);
        const int column = TILE * (first_part + j) + Tile<A>::column(e, lane);
        if (row < job.size[model] && column < size)
          tile.at[e] = scale * gram[((model == TEACHER ? size : 0) + row) * size + column];
      }
      const A inverse = store_pieces<FULL_PIECES<C>>(tile, memory + TILE * i * stride + TILE * j, stride, apart);
      if (lane == 0) shared.inverse[index] = inverse;
    }
    stream(
        head, shared, rows, job.plan.stages, static_cast<int>(first / rows),
        static_cast<int>((last + rows - 1) / rows),
        [&](int block, int slot, const uint8_t* real) {
          load_panel(stages + slot * panel.elements(), panel, head, shared, role,
                     static_cast<int64_t>(block) * rows, real);
        },
        [&](int block, int slot) {
          const C* const x = stages + slot * panel.elements();
          for (int index = warp; index < rows / TILE * count; index += warps) {
            const int r = index % (rows / TILE), j = index / (rows / TILE);
            Tile<A> sum;
            for (int i = 0; i < parts; ++i) {
              int part;
              const int model = model_of(job, i, part), stride_x = panel.stride(model);
              const int left = rounded_up(job.size[model] - TILE * part, 16);
              Tile<A> product;
              multiply<Lies::by_row, Lies::by_row, 1, FULL_PIECES<C>>(
                  product, x + panel.begin(model) + TILE * r * stride_x + TILE * part, stride_x,
                  memory + TILE * i * stride + TILE * j, stride, left < TILE ? left : TILE, apart);
              sum.add(product, shared.inverse[j * parts + i]);
            }
            write_gradient<C>(head, role, sum, factor, static_cast<int64_t>(block) * rows, TILE * r, first_part + j,
                           shared.real[block % FLAG_SETS]);
          }
        });
  }
}

// Rows [first, last) of a head under the guard.
template <typename C, typename A>
METAKD_DEVICE void differentiate_tiles(const Head<A>& head, Shared<A>& shared, C* memory, int role, A factor,
                                       int64_t first, int64_t last) {
  const Job<A>& job = head.job;
  const int edge = edge_of(job.plan.rows), tiles = edge / TILE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Panel<C> panel(job, edge);
  C* const resident = memory + differences<C>(edge);
  C* const stages = resident + panel.elements();
  const int stride = edge + PADDING<C>, apart = edge * stride;
  clear_padding(resident, panel, 1 + job.plan.stages, job);
  const int r = warp % tiles, part = warp / tiles;  // of this warp's tile of the gradient
  for (int i = static_cast<int>(first / edge); i < static_cast<int>((last + edge - 1) / edge); ++i) {
    const int64_t first_row = static_cast<int64_t>(i) * edge;
    load_resident(resident, panel, head, role, first_row, shared);
    Tile<A> sum;
    int from, to;
    columns_for(job, role, i, edge, from, to);
    stream(
        head, shared, edge, job.plan.stages, from, to,
        [&](int j, int slot, const uint8_t* real) {
          load_panel(stages + slot * panel.elements(), panel, head, shared, 1 - role,
                     static_cast<int64_t>(j) * edge, real);
        },
        [&](int j, int slot) {
          const C* const columns = stages + slot * panel.elements();
          const Scores<C, A> scores = {job, panel, role, resident, columns, shared.resident,
                                       shared.real[j % FLAG_SETS], first_row, static_cast<int64_t>(j) * edge};
          for (int tile = warp; tile < tiles * tiles; tile += warps) {
            const int row = tile % tiles, column = tile / tiles;
            const A inverse =
                store_pieces<TWO_PIECES<C>>(scores.difference(row, column),
                                            memory + TILE * row * stride + TILE * column, stride, apart);
            if (lane == 0) shared.inverse[tile] = inverse;
          }
          block_sync();
          if (part >= job.parts(STUDENT)) return;
#pragma unroll 1
          for (int c = 0; c < tiles; ++c) {
            Tile<A> product;
            multiply<Lies::by_row, Lies::by_row, TWO_PIECES<C>, 1>(
                product, memory + TILE * r * stride + TILE * c, stride,
                columns + TILE * c * panel.stride_s + TILE * part, panel.stride_s, TILE, apart);
            sum.add(product, shared.inverse[c * tiles + r]);
          }
        });
    if (part < job.parts(STUDENT))
      write_gradient<C>(head, role, sum, factor, first_row, TILE * r, part, shared.resident);
    block_sync();
  }
}

// gridDim.x = heads x 2 roles x chunks of CHUNK_ROWS rows.
template <typename C, typename A = Sum<C>>
__global__ void __launch_bounds__(32 * MOST_BACKWARD_WARPS, 1)
    attention_score_mse_backward(const __grid_constant__ Job<A> job) {
  auto& shared = *reinterpret_cast<Shared<A>*>(dynamic_shared());
  C* const memory = reinterpret_cast<C*>(dynamic_shared() + SHARED_HEAD<A>);
  const int chunks = job.chunks();
  const int role = static_cast<int>(blockIdx.x / chunks % 2);
  const int64_t first = static_cast<int64_t>(blockIdx.x % chunks) * CHUNK_ROWS;
  const int64_t last = first + CHUNK_ROWS < job.length ? first + CHUNK_ROWS : job.length;
  const Head<A> head(job, blockIdx.x / chunks / 2);
  const A dhead = job.dheads[head.layer * job.dheads_stride[0] + head.b * job.dheads_stride[1] +
                             head.a * job.dheads_stride[2]];
  find_sources<C>(head, shared);
  if (!job.gram_form || job.tiled[head.index])
    differentiate_tiles(head, shared, memory, role, 2 * job.scale[STUDENT] * dhead, first, last);
  else
    multiply_by_gram(head, shared, memory, role, role == QUERY ? 2 * job.scale[STUDENT] * dhead : 2 * dhead, first,
                     last);
}

}  // namespace metakd::attention_score_mse
