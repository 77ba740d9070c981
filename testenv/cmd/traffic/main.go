// Traffic sends and answers the packets of tests.
//
//	traffic udp-send  [-n 7] [-size 64] [-reply] [-parallel 1] [-every 0s] host:port
//	traffic flood     [-n 7] [-size 64] [-ports 100] host:port
//	traffic frag      [-n 7] [-size 4000] host:port
//	traffic udp-echo  [-n 7] [-ready FIFO] [-transparent] [host]:port
//	traffic tcp-serve [-n 1] [-ready FIFO] [host]:port
//	traffic tcp-get   [-n 1] [-size 64] [-parallel 1] host:port
//	traffic http-serve, http-get: the same in HTTP
//	traffic raw       [-n 7] [-proto tcp|udp|icmp] [-flags SYN,ACK…] [-options rr|ts|ra|nop] [-from ADDR] host[:port]
//	traffic arp       [-n 7] [-op 1] [-from ADDR] [-to MAC] ADDR
//	traffic queue     [-n 7] NUMBER=accept|drop|repeat|stop[/MARK],…
//	traffic script    FILE
//
// A script has one of these on each line, with the namespace that it is for: see
// script.go.
//
// A flood goes to -ports ports in turn, from host:port on; every datagram has the
// size that says which turn it is.
//
// Queue reads queues of NFQUEUE and answers, with a mark; like a server it says when it does, and ends
// after -n packets.
//
// A server opens the file of -ready for writing when it can be reached, so with
// a FIFO the reader waits for exactly that. Nothing sleeps. A server ends after
// -n datagrams or connections. Every packet of a run differs from the others in
// a field that the kernel's trace shows: UDP payloads grow by a byte each, raw
// packets count the IP ID up.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "traffic:", err)
		os.Exit(1)
	}
}

type options struct {
	n, size, parallel  int
	ready              string
	reply              bool
	every, timeout     time.Duration
	proto, flags, opts string
	from, to           string
	op                 int
	id, sport, ports   int
	uid                int
	transparent        bool
	forever            bool   // a server that does not end
	onReady            func() // called when a server can be reached
}

func run(args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New("which? udp-send, flood, frag, udp-echo, tcp-serve, tcp-get, http-serve, http-get, raw, arp, queue, script")
	}
	o, addr, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if args[0] == "script" {
		return script(addr, stderr)
	}
	return command(args[0], addr, o, stdout)
}

// parse reads a command's flags and its one argument.
func parse(args []string, stderr io.Writer) (o options, addr string, err error) {
	fs := flag.NewFlagSet(args[0], flag.ContinueOnError)
	fs.SetOutput(stderr)
	n, size := 7, 64
	switch args[0] {
	case "tcp-serve", "tcp-get", "http-serve", "http-get":
		n = 1
	case "frag":
		size = 4000
	}
	fs.IntVar(&o.n, "n", n, "number of datagrams or connections")
	fs.IntVar(&o.size, "size", size, "bytes of payload; of the first datagram, each next has one more")
	fs.IntVar(&o.parallel, "parallel", 1, "number of senders, each sending -n")
	fs.StringVar(&o.ready, "ready", "", "write a line to this file when ready")
	fs.BoolVar(&o.reply, "reply", false, "wait for an answer to each datagram")
	fs.DurationVar(&o.every, "every", 0, "send a datagram so often, not as fast as that goes")
	fs.DurationVar(&o.timeout, "timeout", 10*time.Second, "give up waiting after this time")
	fs.StringVar(&o.proto, "proto", "tcp", "protocol of raw packets: tcp, udp, icmp")
	fs.StringVar(&o.flags, "flags", "SYN", "TCP flags of raw packets, or none")
	fs.StringVar(&o.opts, "options", "", "IPv4 options of raw packets: rr (record route), ts (timestamp), ra (router alert), nop")
	fs.StringVar(&o.from, "from", "", "source address of raw packets and of arp")
	fs.StringVar(&o.to, "to", "", "Ethernet address that arp goes to; broadcast if empty")
	fs.IntVar(&o.op, "op", 1, "operation of arp: 1 asks, 2 answers")
	fs.IntVar(&o.id, "id", 1000, "IP ID of the first raw packet")
	fs.IntVar(&o.sport, "sport", 0, "source port of udp-send, or of the first raw packet (40000)")
	fs.IntVar(&o.ports, "ports", 100, "number of ports that a flood goes to")
	fs.IntVar(&o.uid, "uid", 0, "send as this user")
	fs.BoolVar(&o.transparent, "transparent", false, "of udp-echo: TPROXY may give the socket packets (IP_TRANSPARENT)")
	if err := fs.Parse(args[1:]); err != nil {
		return o, "", err
	}
	if fs.NArg() != 1 {
		return o, "", fmt.Errorf("%s: want one address, got %d", args[0], fs.NArg())
	}
	return o, fs.Arg(0), nil
}

func command(name, addr string, o options, stdout io.Writer) error {
	switch name {
	case "udp-send", "frag":
		return inParallel(o.parallel, func() error { return udpSend(addr, o) })
	case "flood":
		return flood(addr, o)
	case "udp-echo":
		return udpEcho(addr, o)
	case "tcp-serve":
		return serve(addr, o, func(c net.Conn) error {
			r := bufio.NewReader(c)
			line, err := r.ReadString('\n')
			if err != nil {
				return err
			}
			_, err = io.WriteString(c, line)
			return err
		})
	case "http-serve":
		return serve(addr, o, serveHTTP)
	case "tcp-get":
		return inParallel(o.parallel, func() error {
			return get(addr, o, strings.Repeat("x", max(o.size-1, 0))+"\n", io.Discard)
		})
	case "http-get":
		return inParallel(o.parallel, func() error {
			return get(addr, o, "GET / HTTP/1.0\r\nHost: "+addr+"\r\n\r\n", stdout)
		})
	case "raw":
		return raw(addr, o)
	case "arp":
		return sendARP(addr, o)
	case "queue":
		return queue(addr, o)
	}
	return fmt.Errorf("there is no %q", name)
}

func inParallel(n int, f func() error) error {
	if n == 1 {
		return f() // on this thread: see within
	}
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func ready(o options) error {
	if o.onReady != nil {
		o.onReady()
	}
	if o.ready == "" {
		return nil
	}
	return os.WriteFile(o.ready, []byte("ready\n"), 0o644)
}

func udpSend(addr string, o options) error {
	// A connected socket: the kernel counts the IP ID up.
	var d net.Dialer
	if o.sport != 0 {
		d.LocalAddr = &net.UDPAddr{Port: o.sport}
	}
	if o.uid != 0 {
		// The socket's owner is its creator's file system user ID, which is the thread's.
		runtime.LockOSThread()
		if err := setfsuid(o.uid); err != nil {
			return err
		}
		defer setfsuid(0)
	}
	c, err := d.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 65536)
	var tick <-chan time.Time
	if o.every > 0 {
		t := time.NewTicker(o.every)
		defer t.Stop()
		tick = t.C
	}
	for i := range o.n {
		if tick != nil {
			<-tick
		}
		_, err := c.Write(buf[:o.size+i])
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.EACCES) {
			// An ICMP error that an earlier datagram met: this one was not sent.
			_, err = c.Write(buf[:o.size+i])
		}
		if err != nil && !errors.Is(err, syscall.EPERM) { // EPERM: sent, and a rule dropped it
			return err
		}
		if o.reply {
			c.SetReadDeadline(time.Now().Add(o.timeout))
			if _, err := c.Read(buf); err != nil {
				return fmt.Errorf("answer %d: %w", i+1, err)
			}
			clear(buf)
		}
	}
	return nil
}

func flood(addr string, o options) error {
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	c, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return err
	}
	defer c.Close()
	first := to.Port
	buf := make([]byte, 65536)
	for i := range o.n {
		to.Port = first + i%o.ports
		if _, err := c.WriteTo(buf[:o.size+i/o.ports], to); err != nil {
			return err
		}
	}
	return nil
}

func udpEcho(addr string, o options) error {
	var l net.ListenConfig
	if o.transparent {
		l.Control = func(_, _ string, c syscall.RawConn) error {
			var err error
			if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) }); cerr != nil {
				return cerr
			}
			return err
		}
	}
	c, err := l.ListenPacket(context.Background(), "udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := ready(o); err != nil {
		return err
	}
	buf := make([]byte, 65536)
	for i := 0; o.forever || i < o.n; i++ {
		if !o.forever {
			c.SetReadDeadline(time.Now().Add(o.timeout))
		}
		n, from, err := c.ReadFrom(buf)
		if o.forever && errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("datagram %d: %w", i+1, err)
		}
		if _, err := c.WriteTo(buf[:n], from); err != nil && !o.forever {
			return err
		}
	}
	return nil
}

// serve answers o.n connections, one after the other, and closes each first.
func serve(addr string, o options, answer func(net.Conn) error) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := ready(o); err != nil {
		return err
	}
	for i := 0; o.forever || i < o.n; i++ {
		if !o.forever {
			l.(*net.TCPListener).SetDeadline(time.Now().Add(o.timeout))
		}
		c, err := l.Accept()
		if err != nil {
			return fmt.Errorf("connection %d: %w", i+1, err)
		}
		if o.forever {
			// Whatever it comes to, nothing is sent again later.
			c.(*net.TCPConn).SetLinger(0)
			go func() {
				if answer(c) == nil && c.(*net.TCPConn).CloseWrite() == nil {
					io.Copy(io.Discard, c)
				}
				c.Close()
			}()
			continue
		}
		c.SetDeadline(time.Now().Add(o.timeout))
		err = answer(c)
		if err == nil {
			// Stay until the other side has closed, so that the
			// connection's last packet is over when we end.
			if err = c.(*net.TCPConn).CloseWrite(); err == nil {
				_, err = io.Copy(io.Discard, c)
			}
		}
		c.Close()
		if err != nil {
			return fmt.Errorf("connection %d: %w", i+1, err)
		}
	}
	return nil
}

func serveHTTP(c net.Conn) error {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	_, err := io.WriteString(c, "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
	return err
}

func get(addr string, o options, request string, to io.Writer) error {
	for range o.n {
		c, err := net.DialTimeout("tcp", addr, o.timeout)
		if err != nil {
			return err
		}
		c.SetDeadline(time.Now().Add(o.timeout))
		_, err = io.WriteString(c, request)
		n := int64(0)
		if err == nil {
			n, err = io.Copy(to, c)
		}
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		// What was not acknowledged by now is not sent again.
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
		if err == nil && n == 0 {
			err = errors.New("the server closed without an answer")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var tcpFlags = map[string]byte{"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ECE": 64, "CWR": 128}

// ipOptions are IPv4 options (RFC 791), padded to four bytes.
var ipOptions = map[string][]byte{
	"":    nil,
	"nop": {1, 1, 1, 0},
	"rr":  {7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	"ts":  {68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	"ra":  {148, 4, 0, 0},
}

// raw sends packets that no socket would: any flags, IPv4 options, any source.
func raw(addr string, o options) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host, port = addr, "9"
	}
	var dport uint16
	if _, err := fmt.Sscan(port, &dport); err != nil {
		return fmt.Errorf("port %q: %w", port, err)
	}
	dst := net.ParseIP(host)
	if dst == nil {
		return fmt.Errorf("%q is not an address", host)
	}
	var flags byte
	for f := range strings.SplitSeq(o.flags, ",") {
		if f == "none" || f == "" {
			continue
		}
		bit, ok := tcpFlags[strings.ToUpper(f)]
		if !ok {
			return fmt.Errorf("no TCP flag %q", f)
		}
		flags |= bit
	}
	opts, ok := ipOptions[o.opts]
	if !ok {
		return fmt.Errorf("no IP option %q", o.opts)
	}
	src, err := source(o.from, dst)
	if err != nil {
		return err
	}
	v4 := dst.To4() != nil
	if !v4 && len(opts) > 0 {
		return errors.New("IPv6 has no such options")
	}
	proto := map[string]int{"tcp": 6, "udp": 17, "icmp": 1}[o.proto]
	if proto == 0 {
		return fmt.Errorf("no protocol %q", o.proto)
	}
	if proto == 1 && !v4 {
		proto = 58
	}
	family, sockproto := syscall.AF_INET, syscall.IPPROTO_RAW
	if !v4 {
		family, sockproto = syscall.AF_INET6, proto
	}
	fd, err := syscall.Socket(family, syscall.SOCK_RAW, sockproto)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	sport := o.sport
	if sport == 0 {
		sport = 40000
	}
	for i := range o.n {
		payload := transport(proto, src, dst, uint16(sport+i), dport, flags, uint32(i+1), o.size)
		if v4 {
			var sa syscall.SockaddrInet4
			copy(sa.Addr[:], dst.To4())
			err = syscall.Sendto(fd, ipv4(src, dst, proto, uint16(o.id+i), opts, payload), 0, &sa)
		} else {
			var sa syscall.SockaddrInet6
			copy(sa.Addr[:], dst.To16())
			err = syscall.Sendto(fd, payload, 0, &sa)
		}
		if err != nil && !errors.Is(err, syscall.EPERM) { // EPERM: a rule dropped it
			return err
		}
	}
	return nil
}

// setfsuid gives this thread a file system user ID. Its caller runs on one thread only.
func setfsuid(uid int) error {
	unix.SetfsuidRetUid(uid)
	if got, err := unix.SetfsuidRetUid(-1); err != nil || got != uid {
		return fmt.Errorf("setfsuid %d: %v, is %d", uid, err, got)
	}
	return nil
}

// source is the address that the kernel would send from.
func source(from string, dst net.IP) (net.IP, error) {
	if from != "" {
		ip := net.ParseIP(from)
		if ip == nil {
			return nil, fmt.Errorf("%q is not an address", from)
		}
		return ip, nil
	}
	c, err := net.Dial("udp", net.JoinHostPort(dst.String(), "9"))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP, nil
}

func ipv4(src, dst net.IP, proto int, id uint16, opts, payload []byte) []byte {
	hl := 20 + len(opts)
	b := make([]byte, hl, hl+len(payload))
	b[0] = 4<<4 | byte(hl/4)
	binary.BigEndian.PutUint16(b[2:], uint16(hl+len(payload)))
	binary.BigEndian.PutUint16(b[4:], id)
	b[8], b[9] = 64, byte(proto)
	copy(b[12:], src.To4())
	copy(b[16:], dst.To4())
	copy(b[20:], opts)
	binary.BigEndian.PutUint16(b[10:], checksum(0, b))
	return append(b, payload...)
}

// transport builds a TCP, UDP, ICMP or ICMPv6 echo message with its checksum.
func transport(proto int, src, dst net.IP, sport, dport uint16, flags byte, seq uint32, size int) []byte {
	var b []byte
	sum := 0
	switch proto {
	case 6:
		b = make([]byte, 20)
		binary.BigEndian.PutUint32(b[4:], seq)
		b[12], b[13] = 5<<4, flags
		binary.BigEndian.PutUint16(b[14:], 1024)
		sum = 16
	case 17:
		b = make([]byte, 8+size)
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
		sum = 6
	case 1, 58:
		b = make([]byte, 8+size)
		b[0] = map[int]byte{1: 8, 58: 128}[proto]
		binary.BigEndian.PutUint16(b[4:], sport)
		binary.BigEndian.PutUint16(b[6:], uint16(seq))
		sum = 2
	}
	if proto == 6 || proto == 17 {
		binary.BigEndian.PutUint16(b[0:], sport)
		binary.BigEndian.PutUint16(b[2:], dport)
	}
	var pseudo uint32
	if proto != 1 {
		s, d := src.To4(), dst.To4()
		if s == nil || d == nil {
			s, d = src.To16(), dst.To16()
		}
		pseudo = add(add(0, s), d) + uint32(proto) + uint32(len(b))
	}
	binary.BigEndian.PutUint16(b[sum:], checksum(pseudo, b))
	return b
}

func add(sum uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	return sum
}

func checksum(start uint32, b []byte) uint16 {
	sum := add(start, b)
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
