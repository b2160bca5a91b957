// Mesa-Extrapolation for llama.cpp: read texts longer than the model's trained length.
//
// A C API on llama_context. Everything that a caller sees of the context stays as in llama.cpp: token i of a text is
// decoded at position i, llama_memory_seq_rm() rolls back, llama_state_*() save and restore. Only the positions that
// RoPE gets, the keys in the cache and the attention mask know about the plan.
//
//     struct llama_mesa_params params = llama_mesa_unset_params(); // change what you like
//     llama_mesa_fill_params(model, &params);                      // the rest: defaults that fit
//     llama_mesa_enable(ctx, &params);                             // once, before the first decode
//     n_keep = llama_mesa_prompt(ctx, n_tokens, NULL);             // the next n_tokens tokens are one text: make its plan
//     ... llama_mesa_n_batch(ctx, n_left, n_batch) ...             // from position n_keep on, in batches of any size; best of this one
//     llama_decode(ctx, batch); ...
//     llama_decode(ctx, batch_of_one_token); ...                   // generation: the anchor follows by itself
//
// llama_set_abort_callback() works: llama_decode() then returns 2, ubatches that were done are in the memory, keys have moved in all layers
// or in none, and reading goes on from llama_memory_seq_pos_max() + 1.
//
// Functions that can fail return a negative number; llama_mesa_last_error() then says why. None of them aborts, and NULL for a
// model, a context or params is an error like others.

#ifndef LLAMA_MESA_H
#define LLAMA_MESA_H

#include "llama.h"

#include <stdbool.h>
#include <stdint.h>

#define LLAMA_MESA_VERSION 12

#define LLAMA_MESA_UNSET (-1) // of a number in llama_mesa_params: llama_mesa_fill_params chooses it

#ifdef __cplusplus
extern "C" {
#endif

// Members of the weave family, to compare with: docs/METHODS.md defines them.
enum llama_mesa_method {
    LLAMA_MESA_METHOD_MESA          = 0,
    LLAMA_MESA_METHOD_MESA_EXACT    = 1,
    LLAMA_MESA_METHOD_STAR          = 2,
    LLAMA_MESA_METHOD_STAIR         = 3,
    LLAMA_MESA_METHOD_REROPE        = 4,
    LLAMA_MESA_METHOD_LEAKY_REROPE  = 5,
    LLAMA_MESA_METHOD_SELF_EXTEND   = 6,
    LLAMA_MESA_METHOD_LM_INFINITE   = 7,
    LLAMA_MESA_METHOD_STREAMING_LLM = 8,
};

// lengths in tokens, see docs/DESIGN.md
struct llama_mesa_params {
    int32_t train_length; // T, the length that the model was trained at
    int32_t first_chunk;  // F, read by every later chunk
    int32_t chunk;        // C, the longest middle chunk; F + C <= reading_length
    int32_t last_chunk;   // the least length of the last chunk, which reads everything
    int32_t stair_width;  // E of the Stair position encoding; 0: the smallest that fits
    int32_t room;         // positions that a new plan leaves free for generation
    int32_t log_scaling;  // 0 or 1: scale the queries of the last chunk by max(1, ln(i + 1)/ln(log_length))
    int32_t method;       // enum llama_mesa_method
    int32_t window;       // N of the methods other than mesa and star
    int32_t n_sinks;      // first tokens that lm-infinite and streaming-llm keep
    float stair_bias; // logits of keys on the stair, or last_chunk tokens behind, are lowered by stair_bias*ln(E); 0: not. Without effect on ALiBi models
    int32_t log_length;     // the scale of queries is 1 for the first log_length tokens; 0: reading_length
    int32_t reading_length; // R <= T: a longer text is read in chunks, and distances are kept below R
    int32_t read_budget; // keys that a generated token reads at most beside the first chunk and the last tokens; 0: all. Method mesa
    int32_t read_every; // one in so many generated tokens reads everything all the same; 0: 64
};

// LLAMA_MESA_VERSION of the library
LLAMA_API int32_t llama_mesa_version(void);

// why the last failing call of this thread failed, a decode or the loading of a state included; never NULL
LLAMA_API const char * llama_mesa_last_error(void);
LLAMA_API void llama_mesa_clear_error(void);

// params that suit a model trained at train_length tokens; train_length 0: the model's own. All of them 0 if that is impossible
LLAMA_API struct llama_mesa_params llama_mesa_default_params(const struct llama_model * model, int32_t train_length);

// the same for another method, and its name; NULL: there is no such method
LLAMA_API struct llama_mesa_params llama_mesa_method_params(
        const struct llama_model * model, int32_t train_length, int32_t method);
LLAMA_API const char * llama_mesa_method_name(int32_t method);

// everything LLAMA_MESA_UNSET, and the method mesa
LLAMA_API struct llama_mesa_params llama_mesa_unset_params(void);

// Replace what is LLAMA_MESA_UNSET by the default, made smaller where what is set leaves less; train_length: the model's, which may be
// NULL if train_length is set. 0 on success; else params cannot work together, and stay as they are.
LLAMA_API int32_t llama_mesa_fill_params(const struct llama_model * model, struct llama_mesa_params * params);

// NULL if the model can be read with Mesa, else the reason why it cannot; a NULL model has one, too
LLAMA_API const char * llama_mesa_unsupported(const struct llama_model * model);

// 0 on success. Tokens in the context count as read plainly; on a context that is enabled already they must have been.
LLAMA_API int32_t llama_mesa_enable(struct llama_context * ctx, const struct llama_mesa_params * params);

// back to stock llama.cpp; the context is emptied
LLAMA_API void llama_mesa_disable(struct llama_context * ctx);
LLAMA_API bool llama_mesa_enabled(const struct llama_context * ctx);

// Plan the reading of the n_tokens tokens that come next, after the ones in the context.
// breaks: NULL or one byte for every token of the context and of the text (n_past + n_tokens), 1 where a sentence ends,
// 2 where a line ends, else 0.
// A text that fits into reading_length beside what is there needs no plan, and gets none; while a text is read by a plan made by
// hand, that one holds. Returns how many tokens of the context stay. Mostly that is all of them. Where context and text fit into
// reading_length but some of the context was not read plainly, those tokens are removed, to be decoded again in front of the text.
LLAMA_API int32_t llama_mesa_prompt(struct llama_context * ctx, int32_t n_tokens, const uint8_t * breaks);

// 1 if llama_mesa_prompt would cut the n_tokens tokens into chunks, so that breaks matter; else 0
LLAMA_API int32_t llama_mesa_needs_breaks(struct llama_context * ctx, int32_t n_tokens);

// How many of the n_tokens tokens that are left of a text the next batch should take, of n_max at most: where it can, it ends where a
// chunk does. Batches of any size give the same logits, to rounding. Without Mesa n_max, or n_tokens.
LLAMA_API int32_t llama_mesa_n_batch(struct llama_context * ctx, int32_t n_tokens, int32_t n_max);

// A plan made by hand, for the whole text: chunk_starts begins with 0 and the end of the first chunk, and ends with the
// last chunk's start; n_tokens is the text's length. Only before the first token is decoded.
// 0 on success, 1 if it was taken although it needs positions past train_length: llama_mesa_last_error() says how many.
LLAMA_API int32_t llama_mesa_set_plan(struct llama_context * ctx, const int32_t * chunk_starts, int32_t n_chunk_starts,
        int32_t anchor, int32_t stair_width, int32_t n_tokens);

// The plan now: fills at most n_max chunk starts, returns their number.
LLAMA_API int32_t llama_mesa_get_plan(
        struct llama_context * ctx, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width);

// Tokens read, and the position at which each one's key stands in the cache: fills at most n_max, returns their number.
LLAMA_API int32_t llama_mesa_get_key_pos(struct llama_context * ctx, int32_t * key_pos, int32_t n_max);

// Without a context: the plan of a text of n_tokens tokens. As llama_mesa_get_plan; negative if params are invalid.
LLAMA_API int32_t llama_mesa_make_plan(const struct llama_mesa_params * params, int32_t n_tokens,
        const uint8_t * breaks, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width);

// Chunks that are kept. A middle chunk sees the first chunk and itself, so what the cache holds of it depends on the model, the first
// chunk and its own tokens alone: it can be kept, and loaded again behind the same first chunk, in any text, at any place.
//
//     llama_decode(ctx, first chunk);                      // F tokens, the same ones for every chunk
//     llama_decode(ctx, chunk);                            // plainly, behind it: F + n_tokens <= train_length
//     llama_mesa_chunk_save(ctx, F, F + n_tokens, ...);
//     llama_memory_seq_rm(mem, 0, F, -1);                  // and the next one
//
//     llama_mesa_chunk_load(ctx, ...); ...                 // later, behind the first chunk: chunks in any order
//     llama_decode(ctx, question);                         // at least one token, or there are no logits
//
// The result is that of reading those chunks by Mesa. It is not that of full attention. Where all fits into reading_length, distances are
// the true ones, else those of the stair. In a layer with a sliding window the window of a kept chunk's tokens does not reach into the
// chunk in front of it, as it does when the text is read at once; such models need swa_full.
//
// Methods mesa and mesa-exact. Rolling back works to the start of a loaded chunk, and to anywhere outside of them.

// Bytes of a chunk of n_tokens tokens, as llama_mesa_chunk_save writes them.
LLAMA_API int64_t llama_mesa_chunk_size(struct llama_context * ctx, int32_t n_tokens);

// Keep the tokens from .. to-1, which were read plainly (then the first chunk is what is in front of them, and from 0 on it is the first
// chunk itself that is kept) or are a chunk as it was loaded. Keys that moved since they were read, by a plan for a long text, cannot be
// kept: read them anew. Writes to buf, which has room for size bytes; returns the number of bytes.
LLAMA_API int64_t llama_mesa_chunk_save(struct llama_context * ctx, int32_t from, int32_t to, void * buf, size_t size);

// Put a kept chunk of these tokens behind the ones in the context: behind the first chunk, or behind another chunk. 0 on success, else
// nothing has changed: LLAMA_MESA_CHUNK_UNFIT if the bytes cannot be used here (damaged, of another model's shape, KV type, first chunk
// or other tokens), -1 if the context cannot take any.
#define LLAMA_MESA_CHUNK_UNFIT (-2)
LLAMA_API int32_t llama_mesa_chunk_load(
        struct llama_context * ctx, const llama_token * tokens, int32_t n_tokens, const void * buf, size_t size);

// Where the values of its tokens lie in the bytes of a chunk of n_tokens tokens, as llama_mesa_chunk_save writes them: of the last n_layers layers that
// keep some, the last one first. Fills an offset and a size for each, in bytes, if ranges is not NULL. Returns the number of those layers.
LLAMA_API int32_t llama_mesa_chunk_values_at(
        struct llama_context * ctx, int32_t n_tokens, int32_t n_layers, int64_t * ranges);

// Those bytes, one layer's behind the other's, as floats: returns how many numbers a token has; if values is not NULL, fills it, token after token.
// -1 if their size is another one. Nothing else of them is checked: who reads a part of a chunk cannot. The context stays as it is.
LLAMA_API int64_t llama_mesa_chunk_values(struct llama_context * ctx, const void * buf, size_t size, int32_t n_tokens,
        int32_t n_layers, float * values, size_t n_values);

// The middle chunks in the context that were loaded: fills at most n_max pairs (first token, the token after the last), returns their number.
LLAMA_API int32_t llama_mesa_get_loaded(struct llama_context * ctx, int32_t * ranges, int32_t n_max);

// What a token attends to: the weights of attention, after the softmax, in some layers. On request; while it is off, nothing is computed
// for it. It is there of a token that was read alone, in a batch of one as in generation, and not in its chunk; whatever the KV type, with
// flash attention or without.
//
//     llama_mesa_attention_enable(ctx, NULL, 4, LLAMA_MESA_ATTENTION_MEAN);
//     llama_decode(ctx, batch_of_one_token);
//     n_keys = llama_mesa_get_attention(ctx, weights, n_max); // [n_layers][n_keys]

enum llama_mesa_attention_kind {
    LLAMA_MESA_ATTENTION_MEAN  = 0, // of a layer's heads
    LLAMA_MESA_ATTENTION_MAX   = 1, // of each key, over the heads
    LLAMA_MESA_ATTENTION_HEADS = 2, // every head
};

// Of these layers, in this order; or layers NULL: of at most n_layers, evenly of those between 40 and 80 % of the depth, and where there
// are fewer of the nearest beside them. Only of layers that see everything, not of those with a sliding window. n_layers 0: off. Returns the number of layers. llama_mesa_enable switches it off, too.
LLAMA_API int32_t llama_mesa_attention_enable(
        struct llama_context * ctx, const int32_t * layers, int32_t n_layers, int32_t kind);

// Fills at most n_max, returns their number.
LLAMA_API int32_t llama_mesa_get_attention_layers(struct llama_context * ctx, int32_t * layers, int32_t n_max);

// What the last token in the context attended to: the number of keys, itself included, and if there is room for n_max of them all, the
// weights [n_layers][n_keys], or [n_layers][n_head][n_keys]. Without room (weights may be NULL) nothing is written.
// n_rows: NULL, or where the number of rows of a layer goes, n_head or 1.
LLAMA_API int32_t llama_mesa_get_attention(
        struct llama_context * ctx, float * weights, int64_t n_max, int32_t * n_rows);

// Reading less. With read_budget a generated token (one that is decoded alone, and is not part of a text that was announced by
// llama_mesa_prompt) reads the first chunk, the last_chunk tokens before it, and of what lies between as much as the budget allows: the blocks
// that drew most attention from the tokens before it, as two layers tell (of each key the maximum over their heads). A token that would attend to another block more than to any of those is
// computed again with that one. The first token behind a text reads everything, and so does every read_every-th from there on.
// Layers with a sliding window read what they always do. What is left out costs nothing on the CPU with flash attention; elsewhere it is masked
// and no faster. Where the budget covers all, nothing differs from reading everything. While a token reads less, llama_mesa_get_attention
// knows nothing of it.

// What the last token in the context read: fills at most n_max pairs (first token, the token after the last), returns their number.
// 0: everything.
LLAMA_API int32_t llama_mesa_get_read_ranges(struct llama_context * ctx, int32_t * ranges, int32_t n_max);

// Choose by hand what generated tokens read of the tokens that are in the context now; later ones are read anyhow. In order, and apart.
// Holds, whatever read_budget is, until it is set again, or some of those tokens are removed; NULL: as read_budget has it. Method mesa.
LLAMA_API int32_t llama_mesa_set_read_ranges(struct llama_context * ctx, const int32_t * ranges, int32_t n_ranges);

// The layers that tell, of those that see everything; NULL: two between 40 and 80 % of the depth. Models differ in which of their layers look for
// what they need, and each costs a pass over the keys. Until llama_mesa_enable is called again. Returns their number.
LLAMA_API int32_t llama_mesa_set_read_layers(struct llama_context * ctx, const int32_t * layers, int32_t n_layers);

// Fills at most n_max, returns their number; 0: read_budget is 0.
LLAMA_API int32_t llama_mesa_get_read_layers(struct llama_context * ctx, int32_t * layers, int32_t n_max);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_MESA_H
