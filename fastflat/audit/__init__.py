from fastflat.audit._facts import Facts
