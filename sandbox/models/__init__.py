"""The port to models, its adapters, what they cost, and which one is asked next. D9"""
