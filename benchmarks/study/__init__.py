"""What ways to train are worth: perplexities of many small models, each way at its best rates, over seeds."""
