# What scripts use between the real work.
set -eu
cp -a /usr/lib/python3.11 tree
tar cf tree.tar tree
mkdir out
tar xf tree.tar -C out
diff -r tree out/tree
find tree -name '*.py' -print0 | xargs -0 -P2 sha256sum > sums
sort -u sums > /dev/null
install -m 755 sums installed
script --quiet --command 'stty size > size' /dev/null > /dev/null
test -s size
timeout 5 nice -n 1 ionice -c 3 taskset -c 0 setsid flock sums true
test "$(nproc)" -ge 1
df . > /dev/null
mktemp > /dev/null
