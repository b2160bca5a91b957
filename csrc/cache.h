// The caches of a context, and the Mesa state kept in step with them.

#pragma once

#include "state.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_context;

class llama_kv_cache;

namespace mesa {

// the keys of the layers that see everything; null: a kind of memory that Mesa does not know
llama_kv_cache * get_kv(const llama_context & lctx);

// sliding-window layers keep their keys apart; null: there are none
llama_kv_cache * get_kv_swa(const llama_context & lctx);

// cell i holds token i, and nothing else is in the cache
bool cells_in_order(const llama_kv_cache & kv, int32_t n);

// n_tokens cells from n_past on, as a decode leaves them; their rows are left alone
void fill_cells(llama_kv_cache & kv, uint32_t n_pos_per_embd, int32_t n_past, const std::vector<int32_t> & tokens);

// rotate the cached keys lo .. hi-1 on by delta[lo .. hi-1]; the scheduler must be reserved again after that (mesa_reserve)
bool move_keys(llama_context & lctx, llama_kv_cache & kv, const int32_t * delta, int32_t lo, int32_t hi);

// bring every cached key to where the plan wants it. 0; -1: failed; 2: the abort callback, if it may, ended it between two groups of keys
int32_t apply_key_moves(llama_context & lctx, llama_kv_cache & kv, llama_mesa & m, bool may_abort);

// the tokens that the next ones see are there if n are kept: a sliding-window cache of less than full size forgets what left the window
bool can_roll_back(const llama_context & lctx, int32_t n);

// roll the state back to what is left in the cache; false, and the last error is set: something else than the end of the text is gone
bool sync_state(const llama_context & lctx, llama_mesa & m);

// the state of ctx, in step with its cache; null, and the last error is set, if there is none or the cache is not one text from its beginning
llama_mesa * get_mesa_synced(llama_context * ctx);

// why a text that was rolled back into its last loaded chunk cannot go on
std::string in_loaded(const llama_mesa & m);

} // namespace mesa
