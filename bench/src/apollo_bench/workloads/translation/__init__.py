"""Translation: parallel text, the Transformer, beam search, BLEU."""
