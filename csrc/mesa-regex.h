// The regular expressions of llama.cpp's pre-tokenizers, matched without recursion and in about linear time.
//
// llama.cpp hands most of them to std::regex. That calls itself for each character of a run, so that a line of dots, a block of
// base64 or a paragraph in Chinese overflows the stack (at some 25,000 characters on a main thread, far fewer on others), and it
// forgets what it has tried, so that a run of digits takes a time that grows with its square.
//
// Free of llama.cpp, but for the export of one counter.

#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mesa {

// `text` is cut into pieces of the given lengths; each of them is cut at every match of `regex`. The result is the lengths of the
// matches and of what lies between them, the same as std::regex_iterator finds (ECMAScript, in the C locale).
// Nothing, if the expression has syntax that the pre-tokenizers do not use.
//
// With P pieces, N characters and an expression of M instructions: O(M*N) time, O(M*(N + P)) bits and O(N) frames at the worst.
std::optional<std::vector<size_t>> regex_split(
        const std::string & text, const std::string & regex, const std::vector<size_t> & lengths);
std::optional<std::vector<size_t>> regex_split(
        const std::wstring & text, const std::wstring & regex, const std::vector<size_t> & lengths);

} // namespace mesa

extern "C" {

// For the tests. Of the calling thread, since it began: steps of the matcher, and expressions that were left to std::regex.
LLAMA_API void llama_mesa_regex_counts(uint64_t * n_steps, uint64_t * n_unknown);
}
