// The launchers of the CUDA backend, one block a file. Each queues its work on `stream` and
// returns; none allocates, waits or changes the host's view. Arguments were checked before: a
// launcher only throws CudaError when a launch fails.
//
// `extent` is the most slots that may be in use (the capacity while a stream is captured): it sizes
// grids. Kernels read the true length from the layer's counters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "backend.h"
#include "cuda/layer.h"

namespace spectralkv::cuda {

// ---- score_topk.cu

struct UpdateArgs {
  TokensView queries;
  TokensView keys;
  TableView<const std::int32_t> slots;  ///< data null: the slot behind all others
  float scale;
  float softcap;  ///< 0: none
};

/// How an update is spread: thread blocks a graph (0: as many as fill the device, which read the
/// keys twice and need LayerView::update_scratch), and threads of a block.
struct UpdatePlan {
  std::int32_t cluster;
  std::int32_t threads;
};
/// `rooms`: of the graphs of a divided layer; empty: even.
UpdatePlan plan_update(const LayerView& layer, std::int64_t extent,
                       std::span<const std::int64_t> rooms);
/// Bytes of LayerView::update_scratch: what updates of this layer may need.
std::int64_t update_scratch(const LayerView& layer);

/// One new token a sequence: checks and takes its slot, draws its row, clears the slot's scores,
/// advances the counters. One launch where thread-block clusters hold all scores in shared memory.
void launch_update(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                   const UpdatePlan& plan, cudaStream_t stream);

// ---- attend.cu

struct AttendArgs {
  UpdateArgs update;
  TokensView values;
  TableView<void> out;  ///< (B, Hq), each D contiguous elements of the keys' dtype
};

/// Longest rows that attention takes on CUDA.
inline constexpr std::int64_t kMostAttendDim = 256;

/// Whether the current device has the shared memory for rows of that many query heads.
bool attend_fits(std::int64_t group, std::int64_t head_dim);

/// One new token a sequence: its attention, and all that launch_update does. One launch where
/// shared memory holds the scores of a graph; else launch_update follows, and keys are read again.
/// `rooms`: see plan_update.
void launch_attend(const LayerView& layer, const AttendArgs& args, std::int64_t extent,
                   std::span<const std::int64_t> rooms, cudaStream_t stream);

/// What an attention without a graph runs over.
struct AttendShape {
  std::int64_t batch;
  std::int64_t heads;  ///< KV heads
  std::int64_t group;
  std::int64_t head_dim;
  std::int64_t length;                      ///< slots
  TableView<const std::int32_t> positions;  ///< data null: every slot is attended to
};
void launch_decode_attention(const AttendShape& shape, const AttendArgs& args, cudaStream_t stream);

// ---- update_rows.cu

struct UpdateRowsArgs {
  TokensView queries;
  TokensView keys;
  std::int64_t first_slot;
  std::int64_t count;  ///< tokens a sequence, padding included
  std::int64_t row_stride;
  float scale;
  float softcap;
  std::int32_t* drawn;    ///< (B, count) filled by launch_admit: see there
  std::int32_t* scratch;  ///< update_rows_scratch words, a multiple of 256 bytes into its memory
};

/// Words of scratch for a block of `count` tokens a sequence, after which `slots` are in use.
std::int64_t update_rows_scratch(const LayerView& layer, std::int64_t slots, std::int64_t count,
                                 std::int64_t row_stride);

/// Rows of a block of tokens whose slots were admitted.
void launch_update_rows(const LayerView& layer, const UpdateRowsArgs& args, cudaStream_t stream);

// ---- slots.cu

/// Gives a block of `count` tokens the slots [first_slot, first_slot + count): clears these, writes
/// positions (-1 where `valid` u8 (B, count) is 0; data null: all are tokens), advances the
/// counters, and writes to drawn (B, count) 1 where a token gets a row: every row_stride-th of a
/// sequence's tokens, counted from the newest backwards, the newest among them; 0: none.
void launch_admit(const LayerView& layer, std::int64_t first_slot, std::int64_t count,
                  const std::uint8_t* valid, std::int64_t valid_sequence_stride,
                  std::int64_t valid_token_stride, std::int64_t row_stride, std::int32_t* drawn,
                  cudaStream_t stream);

/// Checks slots of new tokens as update does, without taking them, and writes to `plan` (length of
/// the layer afterwards, 1 if every slot is the one behind all others) or a fault to `result`.
void launch_plan_slots(const LayerView& layer, const TableView<const std::int32_t>& slots,
                       std::int64_t* plan, FaultRecord* result, cudaStream_t stream);
void launch_next_slots(const LayerView& layer, const TableView<std::int32_t>& out,
                       std::int64_t extent, cudaStream_t stream);

struct PlaceArgs {
  TokensView new_keys;
  TokensView new_values;
  TokensView keys;  ///< written
  TokensView values;
  TableView<std::int32_t> slots;
  std::int64_t num_slots;  ///< of keys and values, where the layer is even
  std::int64_t key_dim;
  std::int64_t value_dim;
};
/// Copies a token's key and value into the lowest free slot of each head; a head without one is
/// reported to the manager, and gets -1.
void launch_place(const LayerView& layer, const PlaceArgs& args, cudaStream_t stream);

/// Checks kept slots (B, Hkv, count) and writes to `kept` (B, G) how many each graph keeps, or a
/// fault to `result`. Where `expected` (B, G) is not null a graph must keep that many.
void launch_check_keep(const LayerView& layer, const TableView<const std::int32_t>& keep,
                       std::int64_t count, const std::int64_t* expected, std::int64_t* kept,
                       FaultRecord* result, cudaStream_t stream);
/// Before a list of kept slots is used: checks it as launch_check_keep does and reports a fault to
/// the manager. Writes how many each graph keeps to `kept` (B, G) and, for the entry e of a graph's
/// list, new_slots[keep[e]] = e; other entries of `new_slots` (B, G, capacity) mean nothing.
/// `expected`: B * G numbers of the host, or null.
void launch_admit_keep(const LayerView& layer, const TableView<const std::int32_t>& keep,
                       std::int64_t count, const std::int64_t* expected, std::int32_t* new_slots,
                       std::int64_t* kept, cudaStream_t stream);
/// Clears every slot that is not kept; books what is held. Behind launch_admit_keep.
void launch_release(const LayerView& layer, const TableView<const std::int32_t>& keep,
                    std::int64_t count, const std::int32_t* new_slots, const std::int64_t* kept,
                    std::int64_t extent, cudaStream_t stream);
/// What forgetting the newest `count` would do, see Backend::plan_truncate: found and oldest (B,
/// G), and the highest slot that stays, of all graphs of the layer (-1: none), in `last`.
void launch_plan_truncate(const LayerView& layer, std::int64_t count, bool ordered,
                          std::int64_t* found, std::int64_t* oldest, std::int64_t* last,
                          std::int64_t extent, cudaStream_t stream);
/// Copies the rows of one sequence to one of another layer, whose rooms and format of rows may
/// differ: those of the first `length` slots that both have, with the edges to slots that the other
/// has.
void launch_copy_rows(const LayerView& to, std::int64_t to_sequence, const LayerView& from,
                      std::int64_t from_sequence, std::int64_t length, cudaStream_t stream);
/// For each graph of a sequence, one behind its last slot with a token in any sequence: (G).
void launch_taken_slots(const LayerView& layer, std::int64_t* taken, cudaStream_t stream);
/// Tokens that each graph holds: (B, G).
void launch_count_held(const LayerView& layer, std::int64_t* held, cudaStream_t stream);
/// dropped (B) on the device.
void launch_truncate(const LayerView& layer, std::int64_t length, const std::int64_t* dropped,
                     std::int64_t extent, cudaStream_t stream);
/// The counters of a layer without tokens, whose memory is zero.
void launch_begin_layer(const LayerView& layer, cudaStream_t stream);
/// Clears one sequence; length and order of the layer become as given.
void launch_reset(const LayerView& layer, std::int64_t sequence, std::int64_t length, bool ordered,
                  std::int64_t extent, cudaStream_t stream);

// ---- inspect.cu

/// f32 (B, Hkv, length): one population, or the sum over all (-1).
void launch_scores(const LayerView& layer, int population, const TableView<float>& out,
                   std::int64_t extent, cudaStream_t stream);
void launch_visits(const LayerView& layer, int population, const TableView<std::uint32_t>& out,
                   std::int64_t extent, cudaStream_t stream);
void launch_positions(const LayerView& layer, const TableView<std::int32_t>& out,
                      std::int64_t extent, cudaStream_t stream);
/// Live edges first, in the order of the row, behind them -1 and 0. Tables are (B, G, S, K): the
/// last stride is 1.
void launch_rows(const LayerView& layer, const TableView<std::int32_t>& neighbors,
                 const TableView<float>& probabilities, std::int64_t extent, cudaStream_t stream);

// ---- novelty.cu

/// How keys were turned, see Rotary.
struct RotaryView {
  const double* revolutions;  ///< (pairs) a position
  std::int32_t pairs;         ///< 0: they were not
  bool interleaved;
};

/// Floats of scratch; `width` as in WalkConfig::novelty_width.
std::int64_t novelty_scratch(const LayerView& layer, std::int64_t width);
void launch_novelty(const LayerView& layer, const TokensView& keys, const RotaryView& rotary,
                    std::int64_t width, float* scratch, std::int64_t extent, cudaStream_t stream);

// ---- ppr_walk.cu

/// Rules of all walks of a manager.
struct WalkRules {
  std::uint64_t seed;
  std::int64_t walk_length;
  std::uint64_t restart_threshold;     ///< restart_prob in units of 2^-32
  std::int64_t first_stream_of_layer;  ///< total_kv_heads: graphs counted a layer
  std::int64_t head_offset;  ///< added to the graph's number in its sequence; see GraphScope
  struct {
    std::int64_t first_walker;
    std::int64_t walkers;
    std::int32_t restart;  ///< as enum Restart
    std::int32_t count_restarts;
    double recent_fraction;
    std::int64_t recent_tokens;
    double decay;
  } population[kMaxPopulations];
};

/// The beginning of a walk or a solve that new tokens need not wait for: copies the counters of
/// `layers` to those of `copies`, which that reads, and moves the live ones on, by so many `blocks`
/// of random numbers. The rest is as in launch_walk.
void launch_begin_walk(const LayerView* layers, const LayerView* copies, int count,
                       std::uint64_t blocks, std::int64_t most_batch, std::int64_t first_sequence,
                       const SequenceMarks& marks, cudaStream_t stream);
/// Walks the populations listed, of `count` layers at once. `layers` is on the device; `shape` is
/// one of them (all share what is not a pointer, batch, capacity or pool), and those whose rows
/// have another format take no part; `most_batch` and `most_extent` are over them. Sequences
/// [first_sequence, first_sequence + SequenceMarks::kMost) whose bit is set take part. The tables
/// by novelty must be there, see launch_restart_tables.
void launch_walk(const LayerView* layers, int count, const LayerView& shape, const WalkRules& rules,
                 const PopulationList& populations, std::int64_t most_batch,
                 std::int64_t most_extent, std::int64_t first_sequence, const SequenceMarks& marks,
                 cudaStream_t stream);
/// Which restart tables: those of populations that restart by position, which every launch that
/// needs them fills, or by novelty, which stand until weights change.
enum class RestartTables : std::int32_t { recent, novelty };
/// Fills these tables among those of the populations listed, of layers as in launch_walk; `layers`
/// null: of `shape` alone. Those by novelty are due whenever weights were written or slots were
/// emptied or moved.
void launch_restart_tables(RestartTables which, const LayerView* layers, int count,
                           const LayerView& shape, const WalkRules& rules,
                           const PopulationList& populations, std::int64_t most_batch,
                           std::int64_t most_extent, std::int64_t first_sequence,
                           const SequenceMarks& marks, cudaStream_t stream);
/// f32 (B, G, length) of one population; fills its tables, if by position, on the way.
void launch_restart_distribution(const LayerView& layer, const WalkRules& rules, int population,
                                 const TableView<float>& out, std::int64_t extent,
                                 cudaStream_t stream);

// ---- ppr_exact.cu

/// Bytes of scratch for so many graphs, over layers, sequences and populations.
std::int64_t solve_scratch(std::int64_t graphs, std::int64_t most_capacity);
/// As the CPU's solve; layers, populations and sequences as in launch_walk. Tables by position are
/// filled on the way.
void launch_solve(const LayerView* layers, int count, const LayerView& shape,
                  const WalkRules& rules, const PopulationList& populations, double restart_prob,
                  std::int64_t most_batch, std::int64_t most_capacity, std::int64_t most_extent,
                  std::int64_t first_sequence, const SequenceMarks& marks, void* scratch,
                  cudaStream_t stream);

// ---- select.cu

struct SelectArgs {
  std::int64_t window;
  std::int64_t sinks;
  std::int64_t kept_length;
  bool left_aligned;  ///< -1 stand behind the kept slots, not before them
  double shares[kMaxPopulations];
};

/// Writes i32 (B, Hkv, kept_length); graphs of marked sequences are cut to their `budgets` (G, of
/// the host), the others keep what they hold. `marks_scratch` is (B, G, capacity).
void launch_select(const LayerView& layer, const SelectArgs& args, const std::int64_t* budgets,
                   std::int64_t first_sequence, const SequenceMarks& cut,
                   const TableView<std::int32_t>& out, std::int32_t* marks_scratch,
                   std::int64_t extent, cudaStream_t stream);
void launch_safety_mask(const LayerView& layer, std::int64_t window, std::int64_t sinks,
                        double top_fraction, const TableView<std::uint8_t>& out,
                        std::int32_t* marks_scratch, std::int64_t extent, cudaStream_t stream);

// ---- compact.cu

/// A tensor (B, X, S, row) that moves in place: row x of sequence b moves by the list of head x.
struct MoveJob {
  void* data;
  std::int64_t sequence_stride;  ///< bytes, all strides
  std::int64_t row_stride;
  std::int64_t slot_stride;
  std::int64_t width;  ///< bytes of a slot
  std::int32_t rows;   ///< X
};
inline constexpr int kMostMoveJobs = 2;

/// Moves the kept slots keep[e ...] to e ..., in place; every -1 of a list stands before them or
/// every -1 behind them. What lies behind keeps its bytes.
void launch_move(const MoveJob* jobs, int count, std::int64_t batch,
                 const TableView<const std::int32_t>& keep, std::int64_t kept_length,
                 const FaultRecord* fault, cudaStream_t stream);
/// The same, and the graphs of an even layer with it; books lengths. Behind launch_admit_keep,
/// whose results `new_slots` and `kept` are.
void launch_compact(const LayerView& layer, const MoveJob* jobs, int count,
                    const TableView<const std::int32_t>& keep, std::int64_t kept_length,
                    const std::int32_t* new_slots, const std::int64_t* kept, cudaStream_t stream);

}  // namespace spectralkv::cuda
