// What the method's sources share.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mesa {

inline int32_t ceil_div(int32_t a, int32_t b) { // b > 0, a of any sign
    return a >= 0 ? a / b + (a % b != 0) : -((-a) / b);
}

inline int32_t floor_div(int32_t a, int32_t b) { // b > 0, a of any sign
    return a >= 0 ? a / b : -(-a / b + (-a % b != 0));
}

inline std::string str(int32_t v) {
    return std::to_string(v);
}

[[noreturn]] inline void invalid(const std::string & what) {
    throw std::invalid_argument(what);
}

} // namespace mesa
