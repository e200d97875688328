#include "data/sentencepiece_shim.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

/* In the library, but not in its installed headers; weak, so that one without it links too. */
namespace sentencepiece
{
namespace logging
{
__attribute__((weak)) void SetMinLogLevel(int level);
}
} // namespace sentencepiece

struct sentencepiece_processor {
    sentencepiece::SentencePieceProcessor processor;
};

namespace
{

/* Runs body, which returns a status; 0, or -1 with the reason in message. */
template <typename Body> int guarded(char *message, size_t message_bytes, Body body)
{
    try {
        const auto status = body();

        if (status.ok()) {
            return 0;
        }
        std::snprintf(message, message_bytes, "%s", status.ToString().c_str());
    } catch (const std::exception &error) {
        std::snprintf(message, message_bytes, "%s", error.what());
    } catch (...) {
        std::snprintf(message, message_bytes, "unknown exception");
    }
    for (char *c = message; *c != '\0'; c++) { /* messages of cadre are one line */
        *c = *c == '\n' ? ' ' : *c;
    }
    return -1;
}

/* A malloc'd copy of count items, with room for one more that is zero. */
template <typename Item> Item *copy_items(const Item *items, size_t count)
{
    Item *copy = static_cast<Item *>(std::calloc(count + 1, sizeof(Item)));

    if (copy == nullptr) {
        throw std::bad_alloc();
    }
    if (count > 0) {
        std::memcpy(copy, items, count * sizeof(Item));
    }
    return copy;
}

} // namespace

extern "C" {

struct sentencepiece_processor *sentencepiece_load(const void *model, size_t num_bytes,
                                                   char *message, size_t message_bytes)
{
    struct sentencepiece_processor *loaded = nullptr;
    const int result = guarded(message, message_bytes, [&] {
        if (sentencepiece::logging::SetMinLogLevel != nullptr) {
            sentencepiece::logging::SetMinLogLevel(3); /* what is wrong comes back as a status */
        }
        loaded = new struct sentencepiece_processor;
        return loaded->processor.LoadFromSerializedProto(
            {static_cast<const char *>(model), num_bytes});
    });

    if (result != 0) {
        delete loaded;
        return nullptr;
    }
    return loaded;
}

void sentencepiece_free(struct sentencepiece_processor *processor)
{
    delete processor;
}

int32_t sentencepiece_num_pieces(const struct sentencepiece_processor *processor)
{
    return processor->processor.GetPieceSize();
}

int32_t sentencepiece_bos(const struct sentencepiece_processor *processor)
{
    return processor->processor.bos_id();
}

int32_t sentencepiece_eos(const struct sentencepiece_processor *processor)
{
    return processor->processor.eos_id();
}

int32_t sentencepiece_pad(const struct sentencepiece_processor *processor)
{
    return processor->processor.pad_id();
}

const char *sentencepiece_piece(const struct sentencepiece_processor *processor, int32_t id)
{
    return processor->processor.IdToPiece(id).c_str();
}

int sentencepiece_encode(const struct sentencepiece_processor *processor, const char *text,
                         size_t num_bytes, int32_t **ids, int64_t *num_ids, char *message,
                         size_t message_bytes)
{
    return guarded(message, message_bytes, [&] {
        std::vector<int> found;
        const auto status = processor->processor.Encode({text, num_bytes}, &found);

        if (status.ok()) {
            *ids = copy_items(found.data(), found.size());
            *num_ids = static_cast<int64_t>(found.size());
        }
        return status;
    });
}

int sentencepiece_decode(const struct sentencepiece_processor *processor, const int32_t *ids,
                         int64_t num_ids, char **text, size_t *num_bytes, char *message,
                         size_t message_bytes)
{
    return guarded(message, message_bytes, [&] {
        const std::vector<int> wanted(ids, ids + num_ids);
        std::string found;
        const auto status = processor->processor.Decode(wanted, &found);

        if (status.ok()) {
            *text = copy_items(found.data(), found.size());
            *num_bytes = found.size();
        }
        return status;
    });
}

} // extern "C"
