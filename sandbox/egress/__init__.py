"""The one door out: a gateway on the host that parses, decides, resolves, vets, dials and counts. D5"""
