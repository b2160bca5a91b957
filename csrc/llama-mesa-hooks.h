// What the patches of llama.cpp call: all that llama.cpp's own sources know of Mesa. Never installed.

#pragma once

#include "llama.h"
#include "llama-batch.h"
#include "llama-mesa-graph.h"

#include <memory>
#include <vector>

struct ggml_tensor;
struct llama_context;
struct llama_cparams;
struct llm_graph_context;

class llama_batch_allocr;
class llama_kv_cache_context;
class llama_io_read_i;
class llama_io_write_i;
class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;
class llm_graph_input_mesa;
class llm_graph_result;

// llama_kv_cache::init_batch: how many tokens the next ubatch takes
uint32_t llama_mesa_n_ubatch(const llama_mesa & m, const llama_batch_allocr & balloc, uint32_t n_ubatch);

// llama_kv_cache::set_input_kq_mask of the layers that see everything; false: not a Mesa context, nothing is set
// note: cell i holds token i
bool llama_mesa_set_mask(const llama_mesa * m, ggml_tensor * dst, const llama_ubatch & ubatch, bool use_alibi);

// llama_kv_cache::seq_add and the like: what a woven cache cannot do is refused, aloud
bool llama_mesa_refuses(const llama_mesa * m, const char * what);

// llama_context::decode: roll back if tokens were removed, move the anchor if the batch needs it, move keys. What decode returns: 0, or
// -1 if the batch cannot be read, or 2 if the abort callback ended it; the next decode goes on with the keys then
int32_t llama_mesa_decode_begin(llama_context & lctx, const llama_batch & batch);

// llama_context::process_ubatch: the shape of the graph that reads these tokens; and when they have been read
llama_mesa_graph llama_mesa_ubatch_begin(const llama_mesa & m, const llama_ubatch & ubatch);
void llama_mesa_ubatch_end(llama_context & lctx, const llm_graph_result & res, const llama_ubatch & ubatch);

// llama_context::graph_reserve: the largest graph against the whole cache, or of a ubatch that is read in its chunk alone (window)
llama_mesa_graph llama_mesa_graph_reserve(const llama_mesa & m, bool window, uint32_t n_tokens, uint32_t n_ctx);

// llama_context::graph_max_nodes: how many nodes Mesa adds to the graph of a model at most
uint32_t llama_mesa_n_nodes_max(const llama_mesa & m, uint32_t n_layer);

// llm_graph_context::build_attn_inp_kv*: the inputs of the Mesa part of the graph; null where the graph is stock llama.cpp's
llm_graph_input_mesa * llama_mesa_build_inp(const llm_graph_context & gctx, const llama_kv_cache_context * mctx);

// llm_graph_context::build_attn: the attention of a ubatch that is read in its chunk alone.
// Returns null where the stock path over the whole cache is to be taken, with q_cur scaled or moved if it must.
ggml_tensor * llama_mesa_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp,
        ggml_tensor *& q_cur, // [n_embd_head_k, n_head,    n_tokens]
        ggml_tensor * k_cur,  // [n_embd_head_k, n_head_kv, n_tokens], null: the layer uses the keys of another
        ggml_tensor * v_cur,  // [n_embd_head_v, n_head_kv, n_tokens]
        ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);

// the same where some layers have a sliding window: those get the logical positions, and the stock path
ggml_tensor * llama_mesa_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv_iswa * inp,
        ggml_tensor *& q_cur, ggml_tensor *& k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks,
        float kq_scale, int il);

// llm_graph_context::build_attn, where queries and keys are as attention takes them: what the token attends to as an output, if that is
// asked for; inp may be null
void llama_mesa_build_attention(const llm_graph_context & gctx, llm_graph_input_mesa * inp,
        ggml_tensor * q, // [n_embd_head_k, n_head, n_tokens]
        ggml_tensor * k, // [n_embd_head_k, n_head_kv, n_kv, 1]
        ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il);

// llm_graph_input_*::set_input: makes ubatch point to a copy at woven positions, for as long as this lives; nothing if m is null
struct llama_mesa_woven {
    llama_mesa_woven(const llama_mesa * m, const llama_ubatch *& ubatch);

    llama_ubatch copy = {};
    std::vector<llama_pos> pos;
};

// llama_context::state_*: the plan travels with the KV data
void llama_mesa_state_write(const llama_context & lctx, llama_io_write_i & io);
std::shared_ptr<llama_mesa> llama_mesa_state_read(
        const llama_mesa & m, llama_io_read_i & io); // for a context such as m's

// after the KV data: m_new is what was read, or null if the state was saved by stock llama.cpp
void llama_mesa_state_apply(llama_context & lctx, const llama_mesa * m_new);
