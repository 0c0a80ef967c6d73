"""The MNIST lab: one data set, one set of networks and one order of batches for every trainer."""
