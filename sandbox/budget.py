"""Reserve before spending, settle after: no interleaving overspends a limit. Pure and synchronous. D8"""
