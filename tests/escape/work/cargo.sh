# A crate without dependencies: build, test, run. Threads, children and loopback, since those are the calls at risk.
set -eu
cargo init --quiet --offline --vcs none --name tiny tiny
cd tiny
cat > src/main.rs <<'RUST'
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::{process::Command, sync::mpsc, thread};

fn total() -> usize {
    let (sender, receiver) = mpsc::channel();
    for number in 0..4 {
        let sender = sender.clone();
        thread::spawn(move || sender.send(number).unwrap());
    }
    drop(sender);
    receiver.iter().sum()
}

fn main() {
    println!("total {}", total());
}

#[test]
fn threads_add_up() {
    assert_eq!(total(), 6);
}

#[test]
fn a_child_runs() {
    assert!(Command::new("/bin/true").status().unwrap().success());
}

#[test]
fn loopback_carries_bytes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || listener.accept().unwrap().0.write_all(b"hi").unwrap());
    let mut text = String::new();
    TcpStream::connect(address).unwrap().read_to_string(&mut text).unwrap();
    server.join().unwrap();
    assert_eq!(text, "hi");
}
RUST
cargo build --quiet --offline
cargo test --offline 2>&1 | grep -q '3 passed'
test "$(cargo run --quiet --offline)" = "total 6"
