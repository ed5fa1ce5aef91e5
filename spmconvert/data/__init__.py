"""From text files to rows: documents, tokens, and the splits that calibration and training use."""
