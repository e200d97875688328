/* tokenizer.h - text to token ids and back, under Megatron's names (reference M9.6).
 *
 *   Llama2Tokenizer             SentencePiece; encode puts BOS in front; end of document is EOS
 *   GPTSentencePieceTokenizer   SentencePiece as it is; end of document is EOS
 *   SentencePieceTokenizer      SentencePiece with <CLS>, <SEP>, <EOD>, <MASK>, <PAD> (and <BOS>,
 * <EOS> where the model has none) added behind its pieces and recognised in text; end of document
 * is <EOD> NullTokenizer               text is numbers; the last of vocab_size ids is the end of
 * document */
#ifndef CADRE_DATA_TOKENIZER_H
#define CADRE_DATA_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

/* For help and option tables. */
#define TOKENIZER_TYPES                                                                            \
    "Llama2Tokenizer GPTSentencePieceTokenizer SentencePieceTokenizer NullTokenizer"

struct tokenizer;

struct tokenizer_config {
    const char *type;   /* one of the names above */
    const char *model;  /* path of the .model file; unused by NullTokenizer */
    int64_t vocab_size; /* of NullTokenizer */
};

struct token_list {
    int32_t *ids; /* malloc'd */
    int64_t count, capacity;
};

/* NULL with error_set(). */
struct tokenizer *tokenizer_open(const struct tokenizer_config *config);
void tokenizer_close(struct tokenizer *tokenizer); /* NULL is fine */

/* Ids in use, not yet padded. */
int64_t tokenizer_vocab_size(const struct tokenizer *tokenizer);
int32_t tokenizer_eod(const struct tokenizer *tokenizer); /* end of document */
/* -1 where there is none. */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);
int32_t tokenizer_pad(const struct tokenizer *tokenizer);

/* Appends the ids of text to list. These two are safe from several threads. */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t num_bytes,
                     struct token_list *list);
/* The text as a malloc'd, NUL-terminated string; *num_bytes may be NULL. NULL with error_set() if
 * an id is none of the vocabulary. */
char *tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, int64_t num_ids,
                       size_t *num_bytes);

void token_list_append(struct token_list *list, const int32_t *ids, int64_t count);
void token_list_free(struct token_list *list);

#endif
