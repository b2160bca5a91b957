// Backends that are files of their own, as in wheels (MESA_PORTABLE, GGML_BACKEND_DL).

#include "bind.h"

#include "llama.h"

#include <dlfcn.h>

#include <string>

// Loads them from the library's own folder: of the CPU's the best for this machine. Left to itself ggml looks for them beside the
// executable, which is Python, and in the working directory. Here, because the rehearsal has this extension and nothing else.
void load_backends() {
#ifdef GGML_BACKEND_DL
    if (ggml_backend_reg_by_name("CPU")) {
        return;
    }
    Dl_info library;
    if (!dladdr((void *) ggml_backend_load_all_from_path, &library)) {
        throw py::import_error("the folder of libggml cannot be found");
    }
    const std::string path   = library.dli_fname;
    const std::string folder = path.substr(0, path.find_last_of('/'));

    // it tells what it loads, which the rehearsal's reader would take for what llama.cpp says of the model
    ggml_log_callback callback;
    void * user_data;
    llama_log_get(&callback, &user_data);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all_from_path(folder.c_str());
    llama_log_set(callback, user_data);

    if (!ggml_backend_reg_by_name("CPU")) {
        throw py::import_error(
                "no libggml-cpu in " + folder + " runs on this machine: install mesa-gguf again, with pip");
    }
#endif
}
