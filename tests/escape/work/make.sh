# A parallel make with a recursive one below it: the job server is a pipe or a FIFO.
set -eu
cat > Makefile <<'MAKE'
parts := one two three four five six
all: $(parts)
	cat $(parts) > all
$(parts):
	echo $@ > $@
sub:
	$(MAKE) all
MAKE
make --silent -j4 sub
test "$(wc -l < all)" = 6
mkfifo queue
(echo through > queue) &
test "$(cat queue)" = through
