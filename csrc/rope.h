// Rotations: which one a layer has, and moving keys and queries on by some positions.

#pragma once

#include "state.h"

#include <cstdint>
#include <vector>

struct ggml_context;
struct ggml_tensor;

namespace mesa {

// The ROPE node that t [n_embd_head, n_head, n_tokens] went through, and no ROPE node if there is none. Architectures differ in which
// layers rotate, in base, scale, YaRN and dimensions of a layer, in where the rotated dimensions lie, and in what follows the rotation:
// the graph knows.
llama_mesa_rope find_rope(const ggml_tensor * t, llama_mesa_rope res = {}, int32_t offset = 0);

// Rotate keys (or queries) on by pos positions [n_embd_head_k, n_head_kv, n]. RoPE being a group, R(p + q) = R(p) R(q), for every kind
// of it, scaled or not. The attention factor was applied by the first rotation, so that this one must have magnitude 1.
ggml_tensor * rope_move(
        ggml_context * ctx, const llama_mesa_rope & rope, ggml_tensor * k, ggml_tensor * pos, int32_t divisor = 1);

// M-RoPE takes four positions for each token: of a text the first three are equal, and the fourth is 0
// ref: llm_graph_input_pos::set_input
void set_positions(ggml_tensor * t, std::vector<int32_t> & pos, uint32_t n_pos_per_embd);

} // namespace mesa
