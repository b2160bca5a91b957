// mesa_gguf._core: the plan, positions and masks of csrc/mesa-plan.h as NumPy arrays, and llama-mesa.h on a context.
// Typed in mesa_gguf/_core.pyi.

#include "llama-mesa.h"
#include "mesa-params.h"
#include "mesa-plan.h"

#include "ggml.h"
#include "ggml-rpc.h"
#include "gguf.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

namespace py = pybind11;

using i32_array  = py::array_t<int32_t>;
using breaks_arg = std::optional<py::array_t<uint8_t, py::array::c_style | py::array::forcecast>>;

// a NumPy array that owns the vector's memory: no copy
template <typename T>
static py::array_t<T> to_array(std::vector<T> && values) {
    auto * v = new std::vector<T>(std::move(values));
    py::capsule owner(v, [](void * p) { delete (std::vector<T> *) p; });
    return py::array_t<T>(v->size(), v->data(), owner);
}

static const uint8_t * breaks_data(const breaks_arg & breaks, int64_t n_tokens) {
    if (!breaks) {
        return nullptr;
    }
    if (breaks->ndim() != 1 || breaks->size() != n_tokens) {
        throw std::invalid_argument("breaks must have one value for each of the " + std::to_string(n_tokens) + " tokens");
    }
    return breaks->data();
}

static void check_range(int32_t start, int32_t stop) {
    if (start < 0 || stop < start) {
        throw std::invalid_argument("a range of tokens must have 0 <= start <= stop, not " + std::to_string(start) + " and " + std::to_string(stop));
    }
}

template <typename F>
static i32_array map_range(int32_t start, int32_t stop, F && f) {
    check_range(start, stop);
    std::vector<int32_t> res;
    {
        py::gil_scoped_release release;
        res.resize(stop - start);
        for (int32_t i = start; i < stop; ++i) {
            res[i - start] = f(i);
        }
    }
    return to_array(std::move(res));
}

static void check_n(int32_t n_tokens) {
    if (n_tokens < 1) {
        throw std::invalid_argument("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
    }
}

static mesa::plan make_checked(std::vector<int32_t> chunk_starts, int32_t anchor, int32_t stair_width) {
    mesa::plan pl;
    pl.chunk_starts = std::move(chunk_starts);
    pl.anchor       = anchor;
    pl.stair_width  = stair_width;

    // what the position functions rely on; whether it fits into T is validate's business
    if (pl.chunk_starts.empty() || pl.chunk_starts[0] != 0) {
        throw std::invalid_argument("chunk_starts must begin with 0");
    }
    for (size_t c = 1; c < pl.chunk_starts.size(); ++c) {
        if (pl.chunk_starts[c] <= pl.chunk_starts[c - 1]) {
            throw std::invalid_argument("chunk_starts must grow: " + std::to_string(pl.chunk_starts[c]) + " follows " + std::to_string(pl.chunk_starts[c - 1]));
        }
    }
    if (stair_width < 1) {
        throw std::invalid_argument("stair_width is " + std::to_string(stair_width) + ": it must be 1 or more");
    }
    if (anchor < 0) {
        throw std::invalid_argument("anchor is " + std::to_string(anchor) + ": it must be 0 or more");
    }
    return pl;
}

//
// contexts, given as the address of a llama_context
//

static llama_context * to_ctx(uintptr_t ctx) {
    if (ctx == 0) {
        throw std::invalid_argument("the context is closed");
    }
    return (llama_context *) ctx;
}

template <typename E>
static int32_t check(int32_t res) {
    if (res < 0) {
        throw E(llama_mesa_last_error());
    }
    return res;
}

static mesa::plan get_plan(llama_context * ctx) {
    mesa::plan pl;
    pl.chunk_starts.resize(check<std::runtime_error>(llama_mesa_get_plan(ctx, nullptr, 0, nullptr, nullptr)));
    llama_mesa_get_plan(ctx, pl.chunk_starts.data(), (int32_t) pl.chunk_starts.size(), &pl.anchor, &pl.stair_width);
    return pl;
}

static int32_t to_method(const std::string & name) {
    std::string known;
    for (int32_t method = 0; method < mesa::n_methods; ++method) {
        if (name == mesa::method_name(method)) {
            return method;
        }
        known += std::string(method > 0 ? ", " : "") + mesa::method_name(method);
    }
    throw std::invalid_argument("there is no method \"" + name + "\": use one of " + known);
}

//
// GGUF headers, read by ggml's own checked reader
//

static py::object gguf_value(const gguf_context * g, int64_t id) {
    switch (gguf_get_kv_type(g, id)) {
        case GGUF_TYPE_UINT8:   return py::int_(gguf_get_val_u8 (g, id));
        case GGUF_TYPE_INT8:    return py::int_(gguf_get_val_i8 (g, id));
        case GGUF_TYPE_UINT16:  return py::int_(gguf_get_val_u16(g, id));
        case GGUF_TYPE_INT16:   return py::int_(gguf_get_val_i16(g, id));
        case GGUF_TYPE_UINT32:  return py::int_(gguf_get_val_u32(g, id));
        case GGUF_TYPE_INT32:   return py::int_(gguf_get_val_i32(g, id));
        case GGUF_TYPE_UINT64:  return py::int_(gguf_get_val_u64(g, id));
        case GGUF_TYPE_INT64:   return py::int_(gguf_get_val_i64(g, id));
        case GGUF_TYPE_FLOAT32: return py::float_(gguf_get_val_f32(g, id));
        case GGUF_TYPE_FLOAT64: return py::float_(gguf_get_val_f64(g, id));
        case GGUF_TYPE_BOOL:    return py::bool_(gguf_get_val_bool(g, id));
        case GGUF_TYPE_STRING:  {
            const char * s = gguf_get_val_str(g, id);
            return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(s, (Py_ssize_t) strlen(s), "replace"));
        }
        case GGUF_TYPE_ARRAY: {
            // short arrays of numbers are per-layer hyperparameters; the rest (vocabularies) is given by its length
            const size_t n = gguf_get_arr_n(g, id);
            const auto type = gguf_get_arr_type(g, id);
            if (n <= 1024 && (type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_INT32)) {
                const auto * data = (const int32_t *) gguf_get_arr_data(g, id);
                return py::cast(std::vector<int32_t>(data, data + n));
            }
            py::dict d;
            d["length"] = n;
            return std::move(d);
        }
        default: return py::none();
    }
}

static py::dict read_gguf(const std::string & path) {
    std::unique_ptr<gguf_context, decltype(&gguf_free)> g(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }), gguf_free);
    if (!g) {
        throw std::runtime_error("its header is damaged or cut short");
    }
    py::dict metadata;
    for (int64_t id = 0; id < gguf_get_n_kv(g.get()); ++id) {
        metadata[py::str(gguf_get_key(g.get(), id))] = gguf_value(g.get(), id);
    }
    py::list tensors;
    size_t end = 0;
    for (int64_t id = 0; id < gguf_get_n_tensors(g.get()); ++id) {
        const size_t size = gguf_get_tensor_size(g.get(), id);
        end = std::max(end, gguf_get_tensor_offset(g.get(), id) + size);
        tensors.append(py::make_tuple(gguf_get_tensor_name(g.get(), id), ggml_type_name(gguf_get_tensor_type(g.get(), id)), size));
    }
    py::dict res;
    res["metadata"]     = metadata;
    res["tensors"]      = tensors;
    res["n_bytes"]      = gguf_get_data_offset(g.get()) + end;
    return res;
}

// What llama.cpp does with a file before the first prompt, short of touching its weights. It aborts on some damaged files, so
// this runs in a process of its own (mesa_gguf/gguf_file.py). loaded is called with what was found, or None if llama.cpp cannot load
// it, before the graphs are built: architectures that Mesa refuses may abort there.
static void rehearse(const std::string & path, const py::dict & overrides, const py::function & loaded) {
    struct log_errors {
        ggml_log_callback callback;
        void *            user_data;

        log_errors() {
            llama_log_get(&callback, &user_data);
            llama_log_set([](ggml_log_level level, const char * text, void *) {
                if (level == GGML_LOG_LEVEL_ERROR) {
                    fputs(text, stderr);
                }
            }, nullptr);
        }
        ~log_errors() { llama_log_set(callback, user_data); }
    } log;

    auto mparams = llama_model_default_params();
    mparams.no_alloc  = true; // hyperparameters, vocabulary and tensor shapes only
    mparams.load_mode = LLAMA_LOAD_MODE_NONE;

    std::vector<llama_model_kv_override> kv_overrides(overrides.size() + 1); // zeros end it
    size_t i = 0;
    for (const auto & [key, value] : overrides) {
        auto & kv = kv_overrides[i++];
        snprintf(kv.key, sizeof(kv.key), "%s", key.cast<std::string>().c_str());
        if (py::isinstance<py::bool_>(value)) {
            kv.tag      = LLAMA_KV_OVERRIDE_TYPE_BOOL;
            kv.val_bool = value.cast<bool>();
        } else if (py::isinstance<py::int_>(value)) {
            kv.tag      = LLAMA_KV_OVERRIDE_TYPE_INT;
            kv.val_i64  = value.cast<int64_t>();
        } else if (py::isinstance<py::float_>(value)) {
            kv.tag      = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
            kv.val_f64  = value.cast<double>();
        } else {
            kv.tag      = LLAMA_KV_OVERRIDE_TYPE_STR;
            snprintf(kv.val_str, sizeof(kv.val_str), "%s", value.cast<std::string>().c_str());
        }
    }
    if (i > 0) {
        mparams.kv_overrides = kv_overrides.data();
    }

    std::unique_ptr<llama_model, decltype(&llama_model_free)> model(llama_model_load_from_file(path.c_str(), mparams), llama_model_free);
    if (!model) {
        loaded(py::none());
        return;
    }

    // tokenizers throw where a damaged vocabulary lacks a byte, and nobody catches it
    const auto * vocab = llama_model_get_vocab(model.get());
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE) {
        std::string bytes;
        for (int byte = 1; byte < 256; ++byte) {
            bytes += (char) byte;
        }
        std::vector<llama_token> tokens(4*bytes.size());
        llama_tokenize(vocab, bytes.data(), (int32_t) bytes.size(), tokens.data(), (int32_t) tokens.size(), true, true);

        char piece[256];
        for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
            llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, true);
        }
    }

    py::dict res;
    const char * reason = llama_mesa_unsupported(model.get());
    res["unsupported"] = reason ? py::object(py::str(reason)) : py::none();
    res["n_params"]    = llama_model_n_params(model.get());
    res["rope_type"]   = (int) llama_model_rope_type(model.get());
    loaded(res);

    // builds the graphs
    for (const auto flash_attn_type : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
        auto cparams = llama_context_default_params();
        cparams.n_ctx           = 512;
        cparams.flash_attn_type = flash_attn_type;
        if (auto * ctx = llama_init_from_model(model.get(), cparams)) {
            llama_free(ctx);
        }
    }
}

// bytes of a row of n values of a ggml type
static size_t row_size(int type, int64_t n) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
        throw std::invalid_argument("there is no ggml type " + std::to_string(type));
    }
    if (n % ggml_blck_size((ggml_type) type) != 0) {
        throw std::invalid_argument(std::to_string(n) + " values are not a whole number of " + ggml_type_name((ggml_type) type) + " blocks (" + std::to_string(ggml_blck_size((ggml_type) type)) + ")");
    }
    return ggml_row_size((ggml_type) type, n);
}

void load_backends(); // bind_backends.cpp

PYBIND11_MODULE(_core, m) {
    load_backends();

    m.doc() = "Plan, positions and masks of Mesa-Extrapolation, and the C API of llama-mesa.h.";

    m.attr("LLAMA_MESA_VERSION") = LLAMA_MESA_VERSION;
    m.attr("RPC_PROTOCOL") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION, RPC_PROTO_PATCH_VERSION);

    py::list methods;
    for (int32_t method = 0; method < mesa::n_methods; ++method) {
        methods.append(mesa::method_name(method));
    }
    m.attr("METHODS") = py::tuple(methods);

    py::class_<mesa::params>(m, "Params")
        .def(py::init([](int32_t train_length, int32_t first_chunk, int32_t chunk, int32_t last_chunk, int32_t stair_width, int32_t room, bool log_scaling,
                         const std::string & method, int32_t window, int32_t n_sinks, float stair_bias, int32_t log_length) {
            mesa::params p;
            p.method       = to_method(method);
            p.window       = window;
            p.n_sinks      = n_sinks;
            p.stair_bias   = stair_bias;
            p.log_length   = log_length;
            p.train_length = train_length;
            p.first_chunk  = first_chunk;
            p.chunk        = chunk;
            p.last_chunk   = last_chunk;
            p.stair_width  = stair_width;
            p.room         = room;
            p.log_scaling  = log_scaling;
            mesa::validate(p);
            return p;
        }), py::kw_only(), py::arg("train_length"), py::arg("first_chunk"), py::arg("chunk"), py::arg("last_chunk"),
            py::arg("stair_width") = 0, py::arg("room") = 0, py::arg("log_scaling") = true,
            py::arg("method") = "mesa", py::arg("window") = 0, py::arg("n_sinks") = 0, py::arg("stair_bias") = 0.0f, py::arg("log_length") = 0)
        .def_static("default", [](int32_t train_length, const std::string & method) {
            return mesa::params_default(train_length, to_method(method));
        }, py::arg("train_length"), py::arg("method") = "mesa")
        .def_property_readonly("method", [](const mesa::params & p) { return mesa::method_name(p.method); })
        .def_readonly("window",       &mesa::params::window)
        .def_readonly("n_sinks",      &mesa::params::n_sinks)
        .def_readonly("stair_bias",   &mesa::params::stair_bias)
        .def_property_readonly("log_length", &mesa::params::n_unscaled)
        .def_property_readonly("chunked", &mesa::params::chunked)
        .def_readonly("train_length", &mesa::params::train_length)
        .def_readonly("first_chunk",  &mesa::params::first_chunk)
        .def_readonly("chunk",        &mesa::params::chunk)
        .def_readonly("last_chunk",   &mesa::params::last_chunk)
        .def_readonly("stair_width",  &mesa::params::stair_width)
        .def_readonly("room",         &mesa::params::room)
        .def_readonly("log_scaling",  &mesa::params::log_scaling);

    py::class_<mesa::plan>(m, "Plan")
        .def(py::init(&make_checked), py::arg("chunk_starts"), py::arg("anchor"), py::arg("stair_width"))
        .def_property_readonly("chunk_starts", [](py::object self) {
            auto & pl = self.cast<mesa::plan &>();
            auto array = i32_array(pl.chunk_starts.size(), pl.chunk_starts.data(), self); // a view
            array.attr("setflags")(py::arg("write") = false);
            return array;
        })
        .def_readonly("anchor",      &mesa::plan::anchor)
        .def_readonly("stair_width", &mesa::plan::stair_width)
        .def_property_readonly("last_start", &mesa::plan::last_start)
        .def("__eq__", [](const mesa::plan & a, const mesa::plan & b) { return a == b; })
        .def("__hash__", [](const mesa::plan & pl) { return py::hash(py::make_tuple(py::cast(pl.chunk_starts).attr("__len__")(), pl.anchor, pl.stair_width)); })
        .def("validate", [](const mesa::plan & pl, const mesa::params & p, int32_t n_tokens) { mesa::validate(p, pl, n_tokens); }, py::arg("params"), py::arg("n_tokens") = 0)
        .def("n_positions", [](const mesa::plan & pl, int32_t n_tokens) { return mesa::n_pos(pl, n_tokens); }, py::arg("n_tokens"))
        .def("key_positions", [](const mesa::plan & pl, int32_t start, int32_t stop) {
            return map_range(start, stop, [&](int32_t j) { return mesa::key_pos(pl, j); });
        }, py::arg("start"), py::arg("stop"))
        .def("query_positions", [](const mesa::plan & pl, int32_t start, int32_t stop) {
            return map_range(start, stop, [&](int32_t i) { return mesa::query_pos(pl, i); });
        }, py::arg("start"), py::arg("stop"))
        .def("chunk_positions", [](const mesa::plan & pl, int32_t start, int32_t stop) {
            return map_range(start, stop, [&](int32_t i) { return mesa::chunk_pos(pl, i); });
        }, py::arg("start"), py::arg("stop"))
        .def("mask", [](const mesa::plan & pl, int32_t n_tokens) {
            check_n(n_tokens);
            py::array_t<bool> res({ n_tokens, n_tokens });
            bool * data = res.mutable_data();
            {
                py::gil_scoped_release release;
                for (int64_t i = 0; i < n_tokens; ++i) {
                    for (int64_t j = 0; j < n_tokens; ++j) {
                        data[i*n_tokens + j] = mesa::visible(pl, (int32_t) i, (int32_t) j);
                    }
                }
            }
            return res;
        }, py::arg("n_tokens"));

    m.def("make_plan", [](const mesa::params & p, int32_t n_tokens, const breaks_arg & breaks) {
        check_n(n_tokens);
        const uint8_t * data = breaks_data(breaks, n_tokens);
        py::gil_scoped_release release;
        return mesa::make(p, n_tokens, data);
    }, py::arg("params"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("extend_plan", [](const mesa::params & p, const mesa::plan & old, int32_t n_past, int32_t n_tokens, const breaks_arg & breaks) {
        if (n_past < 0 || n_tokens <= n_past) {
            throw std::invalid_argument("n_tokens (" + std::to_string(n_tokens) + ") must be more than n_past (" + std::to_string(n_past) + ")");
        }
        const uint8_t * data = breaks_data(breaks, n_tokens);
        py::gil_scoped_release release;
        return mesa::extend(p, old, n_past, n_tokens, data);
    }, py::arg("params"), py::arg("plan"), py::arg("n_past"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("log_scale", [](int32_t log_length, int32_t start, int32_t stop) {
        check_range(start, stop);
        if (log_length < 2) {
            throw std::invalid_argument("log_length must be 2 or more");
        }
        std::vector<float> res(stop - start);
        for (int32_t i = start; i < stop; ++i) {
            res[i - start] = mesa::log_scale(log_length, i);
        }
        return to_array(std::move(res));
    }, py::arg("log_length"), py::arg("start"), py::arg("stop"));

    m.def("default_params", [](uintptr_t model, int32_t train_length) {
        return mesa::from_c(llama_mesa_default_params((const llama_model *) model, train_length));
    }, py::arg("model"), py::arg("train_length") = 0);

    m.def("unsupported", [](uintptr_t model) -> std::optional<std::string> {
        const char * reason = llama_mesa_unsupported((const llama_model *) model);
        return reason ? std::optional<std::string>(reason) : std::nullopt;
    }, py::arg("model"));

    m.def("enable", [](uintptr_t ctx, const mesa::params & p) {
        const auto c = mesa::to_c(p);
        check<std::runtime_error>(llama_mesa_enable(to_ctx(ctx), &c));
    }, py::arg("ctx"), py::arg("params"));

    m.def("disable", [](uintptr_t ctx) { llama_mesa_disable(to_ctx(ctx)); }, py::arg("ctx"));
    m.def("enabled", [](uintptr_t ctx) { return llama_mesa_enabled(to_ctx(ctx)); }, py::arg("ctx"));

    m.def("prompt", [](uintptr_t ctx, int32_t n_tokens, const breaks_arg & breaks) {
        auto * c = to_ctx(ctx);
        const uint8_t * data = nullptr;
        if (breaks) {
            const int32_t n_past = llama_memory_seq_pos_max(llama_get_memory(c), 0) + 1;
            data = breaks_data(breaks, (int64_t) n_past + n_tokens);
        }
        int32_t res;
        {
            py::gil_scoped_release release;
            res = llama_mesa_prompt(c, n_tokens, data);
        }
        check<std::invalid_argument>(res);
    }, py::arg("ctx"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("set_plan", [](uintptr_t ctx, const mesa::plan & pl, int32_t n_tokens) {
        check<std::invalid_argument>(llama_mesa_set_plan(to_ctx(ctx), pl.chunk_starts.data(), (int32_t) pl.chunk_starts.size(), pl.anchor, pl.stair_width, n_tokens));
    }, py::arg("ctx"), py::arg("plan"), py::arg("n_tokens"));

    m.def("plan", [](uintptr_t ctx) { return get_plan(to_ctx(ctx)); }, py::arg("ctx"));

    m.def("key_positions", [](uintptr_t ctx) {
        auto * c = to_ctx(ctx);
        std::vector<int32_t> res(check<std::runtime_error>(llama_mesa_get_key_pos(c, nullptr, 0)));
        llama_mesa_get_key_pos(c, res.data(), (int32_t) res.size());
        return to_array(std::move(res));
    }, py::arg("ctx"));

    m.def("read_gguf", &read_gguf, py::arg("path"));
    m.def("rehearse", &rehearse, py::arg("path"), py::arg("overrides"), py::arg("loaded"));
    m.def("row_size", &row_size, py::arg("type"), py::arg("n"));
    m.def("type_name", [](int type) {
        row_size(type, 0);
        return std::string(ggml_type_name((ggml_type) type));
    }, py::arg("type"));

    m.def("clear_error", &llama_mesa_clear_error);
    m.def("last_error", []() { return std::string(llama_mesa_last_error()); });
}
