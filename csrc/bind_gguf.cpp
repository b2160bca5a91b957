// Model files: GGUF headers, read by ggml's own checked reader, and what llama.cpp makes of a file.

#include "bind.h"
#include "llama-mesa.h"

#include "ggml-rpc.h"
#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

static py::object gguf_value(const gguf_context * g, int64_t id) {
    switch (gguf_get_kv_type(g, id)) {
        case GGUF_TYPE_UINT8:   return py::int_(gguf_get_val_u8(g, id));
        case GGUF_TYPE_INT8:    return py::int_(gguf_get_val_i8(g, id));
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
            const size_t n  = gguf_get_arr_n(g, id);
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
    std::unique_ptr<gguf_context, decltype(&gguf_free)> g(
            gguf_init_from_file(path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/nullptr }), gguf_free);
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
        end               = std::max(end, gguf_get_tensor_offset(g.get(), id) + size);
        tensors.append(py::make_tuple(
                gguf_get_tensor_name(g.get(), id), ggml_type_name(gguf_get_tensor_type(g.get(), id)), size));
    }
    py::dict res;
    res["metadata"] = metadata;
    res["tensors"]  = tensors;
    res["n_bytes"]  = gguf_get_data_offset(g.get()) + end;
    return res;
}

// Rows of a matrix as floats, whatever its type is [n_rows, ne0]; only they are read from the file. None if the file has no such matrix.
static py::object tensor_rows(const std::string & path, const std::string & name, const std::vector<int64_t> & rows) {
    ggml_context * tensors = nullptr;
    std::unique_ptr<gguf_context, decltype(&gguf_free)> g(
            gguf_init_from_file(path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/&tensors }), gguf_free);
    std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(tensors, ggml_free);
    if (!g) {
        throw std::runtime_error("its header is damaged or cut short");
    }
    const ggml_tensor * tensor = ggml_get_tensor(tensors, name.c_str());
    const int64_t id           = gguf_find_tensor(g.get(), name.c_str());
    if (!tensor || id < 0) {
        return py::none();
    }
    const auto to_float = ggml_get_type_traits(tensor->type)->to_float;
    if (!to_float && tensor->type != GGML_TYPE_F32) {
        return py::none();
    }
    const int64_t n_row  = tensor->ne[0];
    const size_t n_bytes = ggml_row_size(tensor->type, n_row);
    const size_t start   = gguf_get_data_offset(g.get()) + gguf_get_tensor_offset(g.get(), id);

    std::ifstream file(path, std::ios::binary);
    std::vector<char> packed(n_bytes);
    py::array_t<float> res({ (py::ssize_t) rows.size(), (py::ssize_t) n_row });
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i] < 0 || rows[i] >= tensor->ne[1]) {
            throw std::invalid_argument(
                    name + " has " + std::to_string(tensor->ne[1]) + " rows, and no row " + std::to_string(rows[i]));
        }
        if (!file.seekg((std::streamoff) (start + n_bytes * rows[i])) || !file.read(packed.data(), n_bytes)) {
            throw std::runtime_error("it is cut short");
        }
        float * row = res.mutable_data(i);
        if (to_float) {
            to_float(packed.data(), row, n_row);
        } else {
            std::memcpy(row, packed.data(), n_bytes);
        }
    }
    return std::move(res);
}

// What llama.cpp does with a file before the first prompt, short of touching its weights. It aborts on some damaged files, so
// this runs in a process of its own (mesa_gguf/gguf_file.py). loaded is called with what was found, or None if llama.cpp cannot load
// it, before the graphs are built: architectures that Mesa refuses may abort there.
static void rehearse(const std::string & path, const py::dict & overrides, const py::function & loaded) {
    struct log_errors {
        ggml_log_callback callback;
        void * user_data;

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

    auto mparams      = llama_model_default_params();
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
            kv.tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
            kv.val_i64 = value.cast<int64_t>();
        } else if (py::isinstance<py::float_>(value)) {
            kv.tag     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
            kv.val_f64 = value.cast<double>();
        } else {
            kv.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            snprintf(kv.val_str, sizeof(kv.val_str), "%s", value.cast<std::string>().c_str());
        }
    }
    if (i > 0) {
        mparams.kv_overrides = kv_overrides.data();
    }

    std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
            llama_model_load_from_file(path.c_str(), mparams), llama_model_free);
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
        std::vector<llama_token> tokens(4 * bytes.size());
        llama_tokenize(vocab, bytes.data(), (int32_t) bytes.size(), tokens.data(), (int32_t) tokens.size(), true, true);

        char piece[256];
        for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
            llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, true);
        }
    }

    py::dict res;
    const char * reason = llama_mesa_unsupported(model.get());
    res["unsupported"]  = reason ? py::object(py::str(reason)) : py::none();
    res["n_params"]     = llama_model_n_params(model.get());
    res["rope_type"]    = (int) llama_model_rope_type(model.get());
    loaded(res);

    // builds the graphs
    for (const auto flash_attn_type : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
        auto cparams            = llama_context_default_params();
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
        throw std::invalid_argument(std::to_string(n) + " values are not a whole number of " +
                                    ggml_type_name((ggml_type) type) + " blocks (" +
                                    std::to_string(ggml_blck_size((ggml_type) type)) + ")");
    }
    return ggml_row_size((ggml_type) type, n);
}

void bind_gguf(py::module_ & m) {
    m.attr("RPC_PROTOCOL") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION, RPC_PROTO_PATCH_VERSION);

    m.def("read_gguf", &read_gguf, py::arg("path"));
    m.def("tensor_rows", &tensor_rows, py::arg("path"), py::arg("name"), py::arg("rows"));
    m.def("rehearse", &rehearse, py::arg("path"), py::arg("overrides"), py::arg("loaded"));
    m.def("row_size", &row_size, py::arg("type"), py::arg("n"));
    m.def("type_name", [](int type) {
        row_size(type, 0);
        return std::string(ggml_type_name((ggml_type) type));
    }, py::arg("type"));
}
