"""A recipe: what a conversion and a finetune do, as one validated object."""
