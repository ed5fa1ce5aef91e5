"""What a conversion will do: the structure of a model, the layers that patterns name, and the design of each."""
