"""A laboratory that runs anywhere: preferences over real handwriting, and a tiny vision-language model to learn them."""
