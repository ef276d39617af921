# Init, commit, branch, merge, clone in both local ways, gc, fsck.
set -eu
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init --quiet --initial-branch main origin
cd origin
for number in 1 2 3 4; do
    echo "line $number" >> file
    git add file
    git commit --quiet --message "commit $number"
done
git checkout --quiet -b side
echo side > other
git add other
git commit --quiet --message side
git checkout --quiet main
git merge --quiet --no-edit side
cd ..
git clone --quiet origin linked
git clone --quiet "file://$PWD/origin" sent
cd sent
git gc --quiet --aggressive
git fsck --strict
git worktree add --quiet ../tree HEAD
git grep --quiet 'line 3'
test "$(git log --oneline | wc -l)" = 5
