"""Language modeling: corpora, the LSTM, perplexity."""
