// The caches of a context, and the Mesa state kept in step with them.

#pragma once

#include "state.h"

#include <cstdint>

struct llama_context;

class llama_kv_cache;

namespace mesa {

// the keys of the layers that see everything; null: a kind of memory that Mesa does not know
llama_kv_cache * get_kv(const llama_context & lctx);

// sliding-window layers keep their keys apart; null: there are none
llama_kv_cache * get_kv_swa(const llama_context & lctx);

// cell i holds token i, and nothing else is in the cache
bool cells_in_order(const llama_kv_cache & kv, int32_t n);

// bring every cached key to where the plan wants it
bool apply_key_moves(llama_context & lctx, llama_kv_cache & kv, llama_mesa & m);

// the tokens that the next ones see are there if n are kept: a sliding-window cache of less than full size forgets what left the window
bool can_roll_back(const llama_context & lctx, int32_t n);

// roll the state back to what is left in the cache; false, and the last error is set: something else than the end of the text is gone
bool sync_state(const llama_context & lctx, llama_mesa & m);

} // namespace mesa
