"""A laboratory for any machine: preferences over real handwriting and a tiny vision-language model to learn them."""
