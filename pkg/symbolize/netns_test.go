package symbolize

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeSystem has files for namespaces: own, two named ones, one of which
// process 40 is in as well, one that only process 50 is in.
func fakeSystem(t *testing.T) (*System, func(path string) uint32) {
	t.Helper()
	dir := t.TempDir()
	write := func(path string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"proc/self/ns/net", "proc/50/ns/net", "netns/c1", "netns/c2", "proc/uptime", "proc/sys/x"} {
		write(f)
	}
	if err := os.MkdirAll(filepath.Join(dir, "proc/40/ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "netns/c1"), filepath.Join(dir, "proc/40/ns/net")); err != nil {
		t.Fatal(err)
	}
	s := &System{Proc: filepath.Join(dir, "proc"), NetnsDirs: []string{filepath.Join(dir, "netns"), filepath.Join(dir, "none")}, anyFS: true}
	if err := s.init(); err != nil {
		t.Fatal(err)
	}
	return s, func(path string) uint32 {
		t.Helper()
		i, err := s.inode(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
}

func TestNamespaceNames(t *testing.T) {
	s, inode := fakeSystem(t)
	own, c1, p50 := inode("proc/self/ns/net"), inode("netns/c1"), inode("proc/50/ns/net")
	if n := len(s.Namespaces()); n != 4 {
		t.Errorf("%d namespaces", n)
	}
	for _, tt := range []struct {
		spec  string
		inode uint32
		name  string
	}{
		{"c1", c1, "c1"},
		{filepath.Join(s.NetnsDirs[0], "c1"), c1, "c1"},
		{"pid:40", c1, "c1"},
		{"pid:50", p50, fmt.Sprintf("net:[%d]", p50)},
		{fmt.Sprintf("net:[%d]", p50), p50, fmt.Sprintf("net:[%d]", p50)},
		{filepath.Join(s.Proc, "self/ns/net"), own, ""},
	} {
		n, err := s.ResolveNetns(tt.spec)
		if err != nil || n.Inode != tt.inode || n.Name != tt.name {
			t.Errorf("%s: %+v, %v", tt.spec, n, err)
		}
		n, err = s.NamespaceByInode(tt.inode)
		if err != nil || n.Inode != tt.inode || n.Name != tt.name {
			t.Errorf("inode of %s: %+v, %v", tt.spec, n, err)
		}
	}
	for _, spec := range []string{"", "c9", "pid:9", "pid:x", "pid:0", "net:[1]", "net:[x]", "/nowhere/x", "..", "."} {
		if n, err := s.ResolveNetns(spec); err == nil {
			t.Errorf("%q: %+v", spec, n)
		}
	}
	s.learn(p50, "web")
	if n := s.NetnsName(p50); n != "web" {
		t.Errorf("learned name %q", n)
	}
	s.anyFS = false
	if _, err := s.ResolveNetns("c1"); err == nil || !strings.Contains(err.Error(), "not a network namespace") {
		t.Errorf("a file is no namespace: %v", err)
	}
}

// All namespaces at once have the names that each has, and to name twice as many is not four times the work.
func TestNamespacesNames(t *testing.T) {
	s, inode := fakeSystem(t)
	s.learn(inode("proc/50/ns/net"), "web")
	names := 0
	for _, n := range s.Namespaces() {
		if want := s.NetnsName(n.Inode); n.Name != want || n.sys != s {
			t.Errorf("%s is named %q, want %q", n.Path, n.Name, want)
		}
		if n.Name != "" {
			names++
		}
	}
	if names != 3 {
		t.Errorf("%d have names", names)
	}
	work := func(n int) float64 {
		for i := range n {
			if err := os.WriteFile(filepath.Join(s.NetnsDirs[0], fmt.Sprintf("n%d", i)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return testing.AllocsPerRun(1, func() {
			if got := len(s.Namespaces()); got != n+4 {
				t.Fatalf("%d namespaces", got)
			}
		})
	}
	if one, two := work(200), work(400); two > 3*one {
		t.Errorf("%v allocations for 200 namespaces, %v for 400", one, two)
	}
}

// engine answers as Docker does.
func engine(t *testing.T, containers map[string]string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/containers/json" {
			var list []map[string]string
			for n := range containers {
				if n != "broken" {
					list = append(list, map[string]string{"Id": n})
				}
			}
			_ = json.NewEncoder(w).Encode(list)
			return
		}
		name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/containers/"), "/json")
		body, ok := containers[name]
		switch {
		case name == "broken":
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"message":"out of order"}`)
		case !ok:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"message":"No such container: %s"}`, name)
		default:
			fmt.Fprint(w, body)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	return socket
}

func TestResolveContainerErrors(t *testing.T) {
	s, _ := fakeSystem(t)
	ctx := context.Background()
	s.Sockets = []string{filepath.Join(t.TempDir(), "none")}
	_, err := s.ResolveContainer(ctx, "web")
	if !errors.Is(err, ErrNoEngine) || !strings.Contains(err.Error(), "--netns pid:N") {
		t.Errorf("no engine: %v", err)
	}
	state := func(running bool, pid int, mode string) string {
		return fmt.Sprintf(`{"Id":"0123","Name":"/x","State":{"Running":%v,"Pid":%d},"HostConfig":{"NetworkMode":%q}}`, running, pid, mode)
	}
	s.Sockets = append(s.Sockets, engine(t, map[string]string{
		"stopped": state(false, 0, "bridge"),
		"host":    state(true, 50, "host"),
		"none":    state(true, 50, "none"),
		"gone":    state(true, 51, "bridge"),
		"broken":  "",
		"garbage": "<html>",
	}))
	for name, want := range map[string]struct {
		err  error
		text string
	}{
		"nobody":  {ErrNoContainer, `"nobody"`},
		"a/b c":   {ErrNoContainer, "a/b c"},
		"stopped": {ErrNotRunning, "start x first"},
		"host":    {ErrNoNetwork, "network mode host"},
		"none":    {ErrNoNetwork, "--netns pid:50"},
		"gone":    {ErrNoNamespace, "no process 51"},
		"broken":  {nil, "out of order"},
		"garbage": {nil, "invalid character"},
		"":        {nil, "empty"},
	} {
		c, err := s.ResolveContainer(ctx, name)
		if err == nil || want.err != nil && !errors.Is(err, want.err) || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

func TestLearnContainers(t *testing.T) {
	s, inode := fakeSystem(t)
	s.Sockets = []string{"/nowhere", engine(t, map[string]string{
		"0123": `{"Id":"0123","Name":"/web","State":{"Running":true,"Pid":50}}`,
	})}
	if err := s.LearnContainers(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := s.NetnsName(inode("proc/50/ns/net")); n != "web" {
		t.Errorf("name %q", n)
	}
}

func TestEngineSockets(t *testing.T) {
	for host, want := range map[string]string{
		"":                     "/var/run/docker.sock",
		"unix:///run/x.sock":   "/run/x.sock",
		"tcp://127.0.0.1:2375": "/var/run/docker.sock",
	} {
		if got := engineSockets(host); got[0] != want || got[1] != "/run/podman/podman.sock" {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func FuzzParseLink(f *testing.F) {
	f.Add(slices.Concat([]byte{0, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		[]byte{9, 0, 3, 0, 'e', 't', 'h', '0', 0, 0, 0, 0}, []byte{8, 0, 5, 0, 7, 0, 0, 0}, []byte{8, 0, 37, 0, 2, 0, 0, 0},
		[]byte{16, 0, 18, 0, 9, 0, 1, 0, 'v', 'e', 't', 'h', 0, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLink(b)
		if err == nil && (strings.ContainsRune(l.Name, 0) || strings.ContainsRune(l.Kind, 0)) && bytes.Count(b, []byte{0}) == 0 {
			t.Fatalf("%+v", l)
		}
	})
}

// inNamespaces runs shell with two fresh network namespaces, held by processes
// whose pids are in $A and $B, and gives their System. It needs root.
func inNamespaces(t *testing.T, shell string) (s *System, a, b int) {
	t.Helper()
	skipf := t.Skipf
	if os.Getenv("NFTRACE_LIVE") != "" { // make test-live: all is there
		skipf = t.Fatalf
	}
	if os.Geteuid() != 0 {
		skipf("makes network namespaces: wants root")
	}
	hold := func() int {
		// cat reads until the test closes its input: nothing is left behind
		// even where the test dies.
		cmd := exec.Command("unshare", "-n", "cat")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			skipf("unshare: %v", err)
		}
		t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
		return cmd.Process.Pid
	}
	a, b = hold(), hold()
	s, err := NewSystem()
	if err != nil {
		t.Fatal(err)
	}
	// unshare(1) has become cat once the namespace is another.
	for _, pid := range []int{a, b} {
		deadline := time.Now().Add(5 * time.Second)
		for {
			n, err := s.ResolveNetns(fmt.Sprintf("pid:%d", pid))
			if err == nil && n.Inode != s.own {
				break
			}
			if time.Now().After(deadline) {
				skipf("no network namespaces here: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	cmd := exec.Command("sh", "-ec", shell)
	cmd.Env = append(os.Environ(), fmt.Sprintf("A=%d", a), fmt.Sprintf("B=%d", b))
	if out, err := cmd.CombinedOutput(); err != nil {
		skipf("%v: %s", err, out)
	}
	return s, a, b
}

func TestVeths(t *testing.T) {
	// The same ifindex in both namespaces, and a link that points to it from
	// within its own: only the netnsid tells them apart.
	s, a, b := inNamespaces(t, `
		nsenter -n -t $A ip link add eth0 index 7 type veth peer name vethx index 9
		nsenter -n -t $A ip link set vethx netns $B
		nsenter -n -t $B ip link add v0 type veth peer name v1`)
	nsA, err := s.ResolveNetns(fmt.Sprintf("pid:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	nsB, err := s.ResolveNetns(fmt.Sprintf("pid:%d", b))
	if err != nil {
		t.Fatal(err)
	}
	pairs, err := nsA.Veths()
	if err != nil {
		t.Fatal(err)
	}
	if len(pairs) != 1 || pairs[0].Inside.Name != "eth0" || pairs[0].Outside.Name != "vethx" || pairs[0].Netns.Inode != nsB.Inode {
		t.Errorf("%+v", pairs)
	}
	pairs, err = nsB.Veths()
	if err != nil {
		t.Fatal(err)
	}
	if len(pairs) != 3 {
		t.Errorf("%+v", pairs)
	}
	links, err := nsA.Links()
	if err != nil || len(links) != 2 || links[0].Name != "lo" || links[0].Type != 772 || links[0].Peer != 0 {
		t.Errorf("%+v %v", links, err)
	}
	if name, err := nsA.LinkName(7); err != nil || name != "eth0" {
		t.Errorf("%q %v", name, err)
	}
	if name, err := nsA.LinkName(9); err == nil || name != "" {
		t.Errorf("of another namespace: %q %v", name, err)
	}

	s.Sockets = []string{engine(t, map[string]string{
		"web": fmt.Sprintf(`{"Id":"0123","Name":"/web","State":{"Running":true,"Pid":%d},"HostConfig":{"NetworkMode":"bridge"}}`, a),
	})}
	c, err := s.ResolveContainer(context.Background(), "web")
	if err != nil || c.Netns.Inode != nsA.Inode || c.Netns.Name != "web" || len(c.Veths) != 1 || c.Veths[0].Outside.Name != "vethx" {
		t.Errorf("%+v %v", c, err)
	}
	if n, err := s.NamespaceByInode(nsA.Inode); err != nil || n.Name != "web" {
		t.Errorf("%+v %v", n, err)
	}
}

func TestReadSnapshot(t *testing.T) {
	s, a, b := inNamespaces(t, `
		nsenter -n -t $A iptables-legacy-restore <testdata/rules/docker.v4`)
	ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := ReadSnapshot(ns, IPv4, "filter", true)
	if err != nil {
		t.Fatal(err)
	}
	if snap.Native != "" {
		t.Errorf("native: %s", snap.Native)
	}
	want := loadFixture(t, "docker.v4.filter").table
	if len(snap.Table.Entries) != len(want.Entries) || snap.Texts[at(t, snap.Table, "FORWARD", 1)] != "-j DOCKER-USER" {
		t.Errorf("%d entries, %v", len(snap.Table.Entries), snap.Texts)
	}

	// Rendered here where there is no iptables-legacy-save.
	path, dirs := os.Getenv("PATH"), sbin
	t.Cleanup(func() { sbin = dirs })
	sbin = nil
	t.Setenv("PATH", "/nowhere")
	native, err := ReadSnapshot(ns, IPv4, "filter", true)
	if err != nil || !strings.Contains(native.Native, "iptables-legacy-save in PATH") {
		t.Fatalf("%v %+v", err, native)
	}
	if !slices.Equal(native.Texts, snap.Texts) {
		t.Errorf("got %q\nwant %q", native.Texts, snap.Texts)
	}
	os.Setenv("PATH", path)

	// Asking must not create anything.
	empty, err := s.ResolveNetns(fmt.Sprintf("pid:%d", b))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []Family{IPv4, IPv6} {
		for _, table := range []string{"filter", "nat", "security", strings.Repeat("x", 40), ""} {
			if _, err := ReadSnapshot(empty, f, table, true); !errors.Is(err, ErrNoTable) {
				t.Errorf("%v %s: %v", f, table, err)
			}
		}
		err := empty.Do(func() error {
			names, err := TableNames(f)
			if len(names) > 0 {
				t.Errorf("tables %v", names)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestDo is about threads: whatever f does, nftrace stays where it was.
func TestDo(t *testing.T) {
	s, a, _ := inNamespaces(t, "true")
	ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		done := make(chan error)
		for range 4 {
			go func() {
				done <- ns.Do(func() error {
					i, err := s.inode("/proc/thread-self/ns/net")
					if err == nil && i != ns.Inode {
						err = fmt.Errorf("in net:[%d]", i)
					}
					own, ownErr := s.inode("/proc/self/ns/net")
					if ownErr == nil && own != s.own {
						ownErr = fmt.Errorf("the main thread is in net:[%d]", own)
					}
					return errors.Join(err, ownErr)
				})
			}()
		}
		for range 4 {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		if i, err := s.inode("/proc/thread-self/ns/net"); err != nil || i != s.own {
			t.Fatalf("left in net:[%d], %v", i, err)
		}
	}
	fails := errors.New("f fails")
	if err := ns.Do(func() error { return fails }); !errors.Is(err, fails) {
		t.Errorf("got %v", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no word of a goroutine that ended")
	}
	// In nftrace's own, no other goroutine is waited for.
	own, ended := &Namespace{Inode: s.own, sys: s}, make(chan struct{})
	go func() {
		defer close(ended)
		own.Do(func() error { runtime.Goexit(); return nil })
		t.Error("another goroutine ended")
	}()
	<-ended
	gone := &Namespace{Inode: 1, Path: "/nowhere", sys: s}
	if err := gone.Do(func() error { t.Error("f ran"); return nil }); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("got %v", err)
	}
	moved := &Namespace{Inode: ns.Inode, Path: "/proc/self/ns/net", sys: s}
	if err := moved.Do(func() error { return nil }); err != nil {
		t.Errorf("a namespace that is found elsewhere: %v", err)
	}
}
