# Install a local tarball and a local directory offline, run a script, run node's own test runner.
set -eu
mkdir -p packed linked app
for name in packed linked; do
    echo "{\"name\":\"$name\",\"version\":\"1.0.0\",\"main\":\"index.js\"}" > $name/package.json
    echo "module.exports = () => '$name'" > $name/index.js
done
(cd packed && npm pack --silent --offline > /dev/null)
cd app
cat > package.json <<'JSON'
{"name": "app", "version": "1.0.0", "scripts": {"hello": "node -p \"require('packed')()\"", "test": "node --test"}}
JSON
cat > app.test.js <<'JS'
const assert = require('node:assert'), childProcess = require('node:child_process'), crypto = require('node:crypto');
const fs = require('node:fs'), http = require('node:http'), test = require('node:test'), zlib = require('node:zlib');
const { Worker } = require('node:worker_threads');

if (process.send && process.env.ROLE === 'child') {
  process.send('here', () => process.disconnect());
} else {
  test('both packages are installed', () => assert.equal(require('packed')() + require('linked')(), 'packedlinked'));
  test('a worker ends', () => new Promise((done) => new Worker('process.exit(0)', { eval: true }).on('exit', done)));
  test('fetch reaches a local server', async () => {
    const server = http.createServer((request, response) => response.end('x'));
    await new Promise((done) => server.listen(0, '127.0.0.1', done));
    const answer = await fetch(`http://127.0.0.1:${server.address().port}`, { headers: { connection: 'close' } });
    assert.equal(await answer.text(), 'x');
    server.close();
  });
  test('a forked child answers', () => new Promise((done) =>
    childProcess.fork(__filename, { env: { ...process.env, ROLE: 'child' } }).on('message', done)));
  test('a shell runs', () => assert.equal(childProcess.execSync('echo a | cat').toString(), 'a\n'));
  test('a directory is watched', () => fs.watch('.').close());
  test('a file is copied', () => { fs.copyFileSync('package.json', 'copy.json'); fs.rmSync('copy.json'); });
  test('zlib and crypto use the thread pool', async () => {
    await new Promise((done, fail) => zlib.gzip('a', (error) => (error ? fail(error) : done())));
    await new Promise((done, fail) => crypto.scrypt('a', 'b', 8, (error) => (error ? fail(error) : done())));
  });
  test('a name of /etc/hosts resolves', () => require('node:dns/promises').lookup('localhost'));
}
JS
npm install --silent --offline --no-audit --no-fund ../packed/packed-1.0.0.tgz ../linked
test "$(npm run --silent hello)" = packed
npm test > report.txt 2>&1 || { cat report.txt; exit 1; }
grep -q '^# fail 0' report.txt
grep -q '^# cancelled 0' report.txt
