// The numbers that a plan is made from, and what holds among them. Free of ggml and of llama.cpp.

#pragma once

#include <cstdint>
#include <string>

namespace mesa {

// Members of the weave family: who sees whom, and how far apart a query and a key are said to be. t = i - j is the distance.
enum method : int32_t {
    method_mesa          = 0, // chunks, then the anchored stair: plan.h
    method_mesa_exact    = 1, // chunks, then equation 3 with the same N for every query
    method_star          = 2, // chunks, then true distances (Star Attention: the first chunk is the anchor block)
    method_stair         = 3, // equation 3 for every query, no chunks
    method_rerope        = 4, // min(t, N)
    method_leaky_rerope  = 5, // t < N: t, else N + (t - N)/E
    method_self_extend   = 6, // t < N: t, else i/E - j/E + N - N/E, whole numbers
    method_lm_infinite   = 7, // sees the sinks and the last N tokens; min(t, N)
    method_streaming_llm = 8, // the same; sinks stand in front of the window
    n_methods            = 9,
};

const char * method_name(int32_t method); // null: there is no such method

// What a plan is made from. All lengths in tokens.
struct params {
    int32_t train_length = 0; // T: positions 0 .. T-1 are the ones that the model learned

    // R <= T: a text that is longer is read in chunks, and distances are kept below R. T is what the model can be read at, R what it
    // reads well: of many models the one is a part of the other
    int32_t reading_length = 0;

    int32_t first_chunk = 0; // F
    int32_t chunk       = 0; // C, the longest middle chunk; F + C <= R
    int32_t last_chunk  = 0; // the least length of the last chunk
    int32_t stair_width = 0; // E; 0: the smallest that fits
    int32_t room        = 0; // positions that stay free for generation when a plan is made
    int32_t log_scaling = 1; // 0 or 1: scale queries by max(1, ln(i + 1)/ln(log_length))
    int32_t log_length  = 0; // 0: R

    // logits of keys on the stair are lowered by stair_bias*ln(E): E keys share a position, and weigh as one (1) or as E (0)
    // so are those of keys in the last chunk that are last_chunk tokens or more behind the query, and less so from half of it on
    float stair_bias = 0.0f;

    int32_t method  = method_mesa;
    int32_t window  = 0; // N of the methods that have one
    int32_t n_sinks = 4; // first tokens that stay visible, for the methods that forget

    // keys that a generated token reads beside the first chunk and the last_chunk tokens before it; one in read_every tokens reads everything
    // all the same. 0: everything
    int32_t read_budget = 0;
    int32_t read_every  = read_every_default; // 0: the default

    static constexpr int32_t read_every_default = 64;

    // a text is cut into chunks
    bool chunked() const { return method == method_mesa || method == method_mesa_exact || method == method_star; }

    // the scale of queries is 1 for the first tokens, this many
    int32_t n_unscaled() const { return log_length > 0 ? log_length : reading_length; }

    // one in so many generated tokens reads everything
    int32_t read_interval() const { return read_every > 0 ? read_every : read_every_default; }

    // true distances go up to a window
    bool windowed() const { return method != method_mesa && method != method_star; }

    // tokens between the first ones and the window are forgotten
    bool forgets() const { return method == method_lm_infinite || method == method_streaming_llm; }

    // distances are woven for each query by itself
    bool exact() const { return method == method_mesa_exact || method == method_stair; }
};

// of a number that fill chooses
constexpr int32_t unset = -1;

// The numbers that are used where the user gave none, for a model trained at train_length.
params params_default(int32_t train_length, int32_t method = method_mesa, int32_t reading_length = unset);

// method and train_length as they are, the rest unset
params params_unset(int32_t train_length, int32_t method = method_mesa);

// Replace what is unset by the default, made smaller where what is set leaves less.
params fill(const params & p);

// Throw std::invalid_argument that says what is wrong and what to do.
void validate(const params & p);

// A number by which a token is read and that a and b do not share, with its two values; null: they read alike.
// Not among them: what only decides plans (reading_length, first_chunk, chunk, room, stair_width): a text goes on by the numbers that it was begun
// with; and read_budget and read_every, which are the context's own: what is written next may be read for in another way than what is there.
struct difference {
    const char * name = nullptr;
    std::string a;
    std::string b;
};

difference find_difference(const params & a, const params & b);

} // namespace mesa
