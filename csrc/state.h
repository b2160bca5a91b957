// What a context remembers about the text that it has read: the plan, where every cached key stands, and the
// changes of plan, so that they can be undone. Free of ggml and of llama.cpp.

#pragma once

#include "budget.h"
#include "llama-mesa-graph.h"
#include "plan.h"

#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_tensor;

// How a layer rotates its keys: the ROPE node of the model's own graph.
struct llama_mesa_rope {
    bool rotates          = false; // no ROPE node: NoPE
    int32_t op_params[16] = {};
    ggml_tensor * factors = nullptr;
    ggml_tensor * weight  = nullptr; // of a norm that comes after the rotation
    const char * problem  = nullptr; // why the keys cannot be rotated on
};

// What single tokens attend to, for who asked for it: llama_mesa_attention_enable.
struct llama_mesa_attention_rows {
    std::vector<int32_t> layers; // none: it is off
    int32_t kind = 0;            // enum llama_mesa_attention_kind

    std::vector<float> data; // [n_layer][n_rows][n_keys] of the last token
    int32_t n_rows = 0;      // heads, or one for all of them
    int32_t n_keys = 0;      // 0: the last ubatch had more tokens, or was read in its chunk alone

    std::vector<uint8_t> built; // [n_layer] whether the last graph of one token had it
};

// What generated tokens read, where that is not everything: params::read_budget.
struct llama_mesa_read {
    std::vector<mesa::range> ranges; // of the keys 0 .. n_keys-1; those from n_keys on are read anyhow
    int32_t n_keys  = 0;             // tokens there were when the ranges were chosen; 0: they are not
    int32_t n_whole = 0;             // tokens up to the last one that read everything
    bool by_hand    = false;         // by the caller, for as long as the tokens are there

    std::vector<float> scores; // that they are chosen by: mesa::add_scores

    // what the last of n_last tokens read, if that was not everything
    std::vector<mesa::range> last;
    int32_t n_last = 0;
};

struct llama_mesa {
    mesa::params params_own; // the context's
    mesa::params params;     // this text's: after a state was loaded, those that it was saved with
    mesa::plan plan;

    // position at which the key of each token read so far stands in the cache [n_past]
    std::vector<int32_t> key_pos;

    // whether that key was rotated on since it was written, and so was rounded more than once [n_past]
    std::vector<uint8_t> key_moved;

    // the tokens read so far; -1: not known, as of embeddings [n_past]
    std::vector<int32_t> tokens;

    struct plan_change {
        int32_t n_past; // tokens read when the plan changed
        mesa::plan before;
    };

    std::vector<plan_change> changes;

    // chunks whose keys and values were loaded, not read; in order. None of them goes on: they end where they ended when they were saved
    struct loaded_chunk {
        int32_t start;
        int32_t end; // after n_past if tokens of it were removed
    };

    std::vector<loaded_chunk> loaded;

    // tokens up to here are read under a plan made by hand, whatever positions it leads to
    int32_t n_by_hand = 0;

    // the plan has changed since key_pos was last brought into line with it
    bool keys_stale = false;

    std::vector<llama_mesa_rope> rope; // [n_layer], filled whenever a graph is built

    bool has_swa = false; // some layers have a sliding window and get the logical positions

    bool on_cpu = true; // no other device computes

    llama_mesa_attention_rows attention;

    llama_mesa_read read;
    llama_mesa_attention_rows read_by; // what read is chosen by

    // tokens up to here are a text, not generated one by one
    int32_t n_announced = 0;

    // rows of a window are padded to a multiple of this (GPU flash attention wants 256); 1: no padding
    int32_t n_pad = 1;

    // the V cache is transposed: its rows are taken as two ranges, not one by one
    bool v_trans = false;

    int32_t n_past() const { return (int32_t) key_pos.size(); }

    // tokens up to here lie in loaded chunks or before them; 0: there are none
    int32_t loaded_end() const { return loaded.empty() ? 0 : loaded.back().end; }

    // all tokens were read as stock llama.cpp reads them, and the plan goes on like that
    bool is_plain() const;

    void set_plan(mesa::plan plan_new);

    // the plan by which the last token was read: without what was announced and not read
    const mesa::plan & plan_read() const;

    // forget all tokens from n_past on, and every change of plan that was made for them
    void roll_back(int32_t n_past_new);

    // nothing is read: what a text that is gone has left does not hold for the next one
    void start_anew();

    // forget the changes of plan after which no token was read
    void drop_unread();

    // note that the n tokens after n_past are in the cache, at the positions of the plan; tokens_new may be null
    void append(int32_t n, const int32_t * tokens_new = nullptr);

    // note that the cached key j was rotated on by delta positions
    void move_key(int32_t j, int32_t delta);

    // delta[j]: how far the cached key j must be rotated to stand where the plan wants it; returns the range [lo, hi) of those that must
    void key_moves(std::vector<int32_t> & delta, int32_t & lo, int32_t & hi) const;

    // does the token at pos, decoded alone, read the chosen ranges only; and does it choose for the next one?
    bool reads_less(int32_t pos) const;
    bool chooses(int32_t pos) const;

    // the token at pos read less, and missed what it would attend to: now the ranges have that, and it is to be computed again
    bool choose_again(int32_t pos, const float * weights);

    // note what the token at pos read, and choose by what each key drew from it [pos + 1]; null: it does not choose
    void note_read(int32_t pos, const float * weights);

    // worst case, for reserving memory: against the whole cache, or in a window
    llama_mesa_graph graph_reserve(bool window, int32_t n_tokens, int32_t n_ctx) const;

    // the n tokens at pos, all on one side of the last chunk's start
    llama_mesa_graph graph(int32_t pos, int32_t n) const;

    // cached rows in front of a ubatch at pos: the first chunk's, then those of its own chunk
    // returns the number of rows; rows may be null
    int32_t window_rows(int32_t pos, std::vector<int32_t> * rows) const;

    // position of token i as query (and, while its chunk is read, as key)
    // note: what sliding-window layers get is i itself
    int32_t pos(int32_t i) const { return i < plan.last_start() ? chunk_pos(i) : mesa::query_pos(plan, i); }

    int32_t chunk_pos(int32_t i) const { return params.method == mesa::method_star ? i : mesa::chunk_pos(plan, i); }
};

// the state as bytes, to be saved beside the KV data
std::vector<uint8_t> llama_mesa_pack(const llama_mesa & m);

// throws std::runtime_error with the reason; m is changed only on success
void llama_mesa_unpack(llama_mesa & m, const uint8_t * data, size_t size);
