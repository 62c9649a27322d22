// Prints what llama.cpp reserves on simulated CUDA cards, without data: a line per buffer type, with the bytes of
// weights, cache and compute buffer.
// FILE CARDS GPU_LAYERS CONTEXT UBATCH [PATTERN=BUFFER ...]
// The cards answer as ggml-cuda.cu does: sizes of tensors, and which operations on the host's weights they take.
#include "ggml-backend-impl.h"
#include "llama-ext.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <string>
#include <vector>

struct Card {
    std::string name;
    ggml_backend_device device;
    ggml_backend_buffer_type type;
};

static size_t number_of_cards = 1;
static Card cards[8];
static ggml_backend_reg registry;
static uint8_t guid_bytes[16] = {7};

static Card * card_of(ggml_backend_dev_t device) { return static_cast<Card *>(device->context); }

static size_t tensor_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t size = ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % 512) {
        size += ggml_row_size(t->type, 512 - t->ne[0] % 512);
    }
    return size;
}

static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_i i{};
    i.get_base = [](ggml_backend_buffer_t) { return reinterpret_cast<void *>(0x100000000ull); };
    i.clear = [](ggml_backend_buffer_t, uint8_t) {};
    return ggml_backend_buffer_init(type, i, nullptr, size);
}

static bool offloads(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS: return false;
        case GGML_OP_MUL_MAT: return op->ne[1] >= 32;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK: return op->ne[2] >= 32;
        default: return ggml_nrows(op) >= 32;
    }
}

static ggml_backend_t start(ggml_backend_dev_t device, const char *) {
    auto * backend = new ggml_backend();
    backend->guid = reinterpret_cast<ggml_guid_t>(guid_bytes);
    backend->device = device;
    backend->iface.get_name = [](ggml_backend_t b) { return card_of(b->device)->name.c_str(); };
    backend->iface.free = [](ggml_backend_t b) { delete b; };
    backend->iface.graph_compute = [](ggml_backend_t, ggml_cgraph *) { return GGML_STATUS_SUCCESS; };
    backend->iface.synchronize = [](ggml_backend_t) {};
    backend->iface.event_record = [](ggml_backend_t, ggml_backend_event_t) {};
    backend->iface.event_wait = [](ggml_backend_t, ggml_backend_event_t) {};
    return backend;
}

static void make_card(Card & card, size_t number) {
    card.name = "CUDA" + std::to_string(number);
    card.device = {};
    card.device.context = &card;
    card.device.reg = &registry;
    auto & i = card.device.iface;
    i.get_name = i.get_description = [](ggml_backend_dev_t d) { return card_of(d)->name.c_str(); };
    i.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 80ull << 30; };
    i.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    i.get_props = [](ggml_backend_dev_t d, ggml_backend_dev_props * p) {
        *p = {};
        p->name = p->description = card_of(d)->name.c_str();
        p->memory_free = p->memory_total = 80ull << 30;
        p->type = GGML_BACKEND_DEVICE_TYPE_GPU;
        p->caps.async = p->caps.events = true;
    };
    i.init_backend = start;
    i.get_buffer_type = [](ggml_backend_dev_t d) { return &card_of(d)->type; };
    i.supports_op = [](ggml_backend_dev_t, const ggml_tensor *) { return true; };
    i.supports_buft = [](ggml_backend_dev_t d, ggml_backend_buffer_type_t t) { return t == &card_of(d)->type; };
    i.offload_op = offloads;
    i.event_new = [](ggml_backend_dev_t d) { return new ggml_backend_event{d, nullptr}; };
    i.event_free = [](ggml_backend_dev_t, ggml_backend_event_t e) { delete e; };
    i.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) {};
    card.type = {};
    card.type.context = &card;
    card.type.device = &card.device;
    card.type.iface.get_name = [](ggml_backend_buffer_type_t t) { return static_cast<Card *>(t->context)->name.c_str(); };
    card.type.iface.alloc_buffer = allocate;
    card.type.iface.get_alignment = [](ggml_backend_buffer_type_t) -> size_t { return 128; };
    card.type.iface.get_alloc_size = tensor_size;
}

int main(int argc, char ** argv) {
    number_of_cards = strtoul(argv[2], nullptr, 10);
    for (size_t i = 0; i < number_of_cards; i++) {
        make_card(cards[i], i);
    }
    registry = {};
    registry.api_version = GGML_BACKEND_API_VERSION;
    registry.iface.get_name = [](ggml_backend_reg_t) { return "CUDA"; };
    registry.iface.get_device_count = [](ggml_backend_reg_t) { return number_of_cards; };
    registry.iface.get_device = [](ggml_backend_reg_t, size_t i) { return &cards[i].device; };
    registry.iface.get_proc_address = [](ggml_backend_reg_t, const char *) -> void * { return nullptr; };
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    ggml_backend_reg_by_name("CPU");
    ggml_backend_register(&registry);
    llama_backend_init();

    std::list<std::string> patterns;
    std::vector<llama_model_tensor_buft_override> overrides;
    for (int i = 6; i < argc; i++) {
        const std::string text = argv[i], buffer = text.substr(text.rfind('=') + 1);
        patterns.push_back(text.substr(0, text.rfind('=')));
        auto * type = buffer == "CPU" ? ggml_backend_cpu_buffer_type() : &cards[atoi(buffer.c_str() + 4)].type;
        overrides.push_back({patterns.back().c_str(), type});
    }
    overrides.push_back({nullptr, nullptr});
    auto model_params = llama_model_default_params();
    model_params.n_gpu_layers = atoi(argv[3]);
    model_params.no_alloc = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    if (overrides.size() > 1) model_params.tensor_buft_overrides = overrides.data();
    auto * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) return 1;
    auto params = llama_context_default_params();
    params.n_ctx = atoi(argv[4]);
    params.n_batch = 2048;
    params.n_ubatch = atoi(argv[5]);
    params.n_seq_max = params.n_outputs_max = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    auto * context = llama_init_from_model(model, params);
    if (!context) return 2;
    for (const auto & [type, data] : llama_get_memory_breakdown(context)) {
        printf("%s %zu %zu %zu\n", ggml_backend_buft_name(type), data.model, data.context, data.compute);
    }
}
