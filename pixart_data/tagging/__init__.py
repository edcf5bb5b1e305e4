"""Tokens and part-of-speech tags of captions: exactly what `nltk.pos_tag(nltk.word_tokenize(caption))` gives, compiled.

`engines.open_engine` picks the engine: the compiled one, NLTK itself where that cannot be trusted to agree with it, or
TextBlob's lexicon on request. All have one face, `blocks.Engine`, and share what reads their results.
"""
