"""Storages that a network leads to: their clients and options, what their errors mean, the promises they are held to."""
