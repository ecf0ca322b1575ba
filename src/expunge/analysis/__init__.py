"""What a model has learnt: concepts, where they are in an image, which inputs a value rests on."""
