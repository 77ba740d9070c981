package testenv

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// links are the names under which multi-call programs are used. iptables and
// its kin without -legacy or -nft go through /etc/alternatives as on Debian, so
// that a test can switch them; they start as nft, Debian's default.
var links = func() map[string]string {
	m := map[string]string{"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64"}
	for _, n := range []string{"iptables", "ip6tables", "arptables", "ebtables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			m["/usr/sbin/"+n+"-nft"+suffix] = "xtables-nft-multi"
			if strings.HasPrefix(n, "ip") {
				m["/usr/sbin/"+n+"-legacy"+suffix] = "xtables-legacy-multi"
			}
			m["/usr/sbin/"+n+suffix] = "/etc/alternatives/" + n + suffix
			m["/etc/alternatives/"+n+suffix] = "/usr/sbin/" + n + "-nft" + suffix
		}
	}
	m["/usr/sbin/xtables-monitor"] = "xtables-nft-multi"
	m["/usr/bin/sh"] = "dash"
	for _, n := range []string{"modprobe", "insmod", "rmmod", "lsmod", "depmod", "modinfo"} {
		m["/usr/sbin/"+n] = "/usr/bin/kmod"
	}
	return m
}()

// moduleDirs are the parts of the module tree that guests get: all that has to
// do with packets, and the disks and ports of a VM. What these depend on comes
// along from anywhere.
var moduleDirs = []string{
	"net",
	"lib",
	"drivers/net",
	"drivers/virtio",
	"drivers/char/virtio_console",
	"drivers/block/virtio_blk",
	"drivers/block/null_blk",
	"drivers/block/loop",
	"fs/overlayfs",
	"fs/nls",
}

// withoutModules are subtrees with hardware and protocols that no test has.
var withoutModules = []string{
	"drivers/net/ethernet", "drivers/net/wireless", "drivers/net/phy", "drivers/net/usb", "drivers/net/hyperv",
	"drivers/net/vmxnet3", "drivers/net/fjes", "drivers/net/mdio", "drivers/net/wwan", "net/vmw_vsock",
	"net/ceph", "net/sunrpc", "net/9p", "net/smc", "net/rds", "net/tipc", "net/rxrpc", "net/mac80211", "net/wireless",
	"net/bluetooth", "net/dccp", "net/can", "net/nfc", "net/batman-adv", "net/openvswitch", "net/ieee802154", "net/mac802154",
	"net/6lowpan", "net/rfkill", "net/l2tp", "net/atm", "net/appletalk", "net/lapb", "net/x25", "net/ax25", "net/netrom", "net/rose",
	"net/dns_resolver", "net/handshake", "net/qrtr", "net/kcm", "net/hsr", "net/mpls",
}

// etc are small files of the guest's own.
var etc = map[string]string{
	"/etc/passwd":        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
	"/etc/group":         "root:x:0:\nnogroup:x:65534:\n",
	"/etc/hosts":         "127.0.0.1 localhost\n::1 localhost\n",
	"/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nprotocols: files\nservices: files\n",
}

// initramfsFormat is part of the cache key: change it when this file builds
// something else from the same parts.
const initramfsFormat = "1"

// Initramfs returns the path of the kernel's base archive, building it if the
// parts have changed. It is not compressed: under TCG the guest unpacks 60 MB
// of plain cpio faster than it inflates 20 MB of gzip.
func Initramfs(ctx context.Context, k *Kernel, log io.Writer) (string, error) {
	r, err := rootOf(ctx, k, log)
	if err != nil {
		return "", err
	}
	files, err := r.files()
	if err != nil {
		return "", err
	}
	key, err := contentKey(k, files)
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "initramfs")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	out := filepath.Join(cache, k.Release+"-"+key+".cpio")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	fmt.Fprintf(log, "vm: building the initramfs for %s\n", k.Release)
	tmp, err := os.MkdirTemp(cache, ".build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := buildInitramfs(ctx, k, files, tmp); err != nil {
		return "", fmt.Errorf("initramfs for %s: %w", k.Release, err)
	}
	// Only the newest of each kernel is of use.
	old, _ := filepath.Glob(filepath.Join(cache, k.Release+"-*.cpio"))
	if err := os.Rename(filepath.Join(tmp, "cpio"), out); err != nil {
		return "", err
	}
	for _, f := range old {
		if f != out {
			os.Remove(f)
		}
	}
	return out, nil
}

// contentKey hashes what goes into the archive. A kernel's package directory
// never changes, so its name stands for it.
func contentKey(k *Kernel, files map[string]string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, initramfsFormat, k.Package, k.Version, links, moduleDirs, withoutModules, etc)
	for _, guest := range sortedKeys(files) {
		f, err := os.Open(files[guest])
		if err != nil {
			return "", err
		}
		sum := sha256.New()
		_, err = io.Copy(sum, f)
		f.Close()
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %x\n", guest, sum.Sum(nil))
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

func buildInitramfs(ctx context.Context, k *Kernel, files map[string]string, tmp string) error {
	if err := stageModules(ctx, k, tmp); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(tmp, "cpio"))
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	for _, d := range []string{"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/proc", "/sys", "/dev", "/tmp", "/run", "/root",
		"/etc", "/var/lib", "/mnt", "/usr/local/bin"} {
		a.dir(d)
	}
	a.symlink("/var/run", "/run")
	provided := map[string]bool{}
	for _, name := range sortedKeys(links) {
		a.symlink(name, links[name])
		provided[path.Base(name)] = true
	}
	for _, name := range sortedKeys(files) {
		a.file(name, files[name])
		provided[path.Base(name)] = true
	}
	for _, name := range sortedKeys(etc) {
		a.data(name, 0o644, []byte(etc[name]))
	}
	// The machine's own has the same applets as one of another architecture, and runs.
	applets, err := output(ctx, "", "busybox", "--list-full")
	if err != nil {
		return err
	}
	for _, applet := range strings.Fields(applets) {
		if provided[path.Base(applet)] {
			continue
		}
		dir := "/usr/bin/"
		if strings.HasPrefix(applet, "sbin/") || strings.HasPrefix(applet, "usr/sbin/") {
			dir = "/usr/sbin/"
		}
		a.symlink(dir+path.Base(applet), "/usr/bin/busybox")
	}
	a.tree("/usr/lib/modules", filepath.Join(tmp, "lib/modules"))
	if err := a.close(); err != nil {
		return err
	}
	return f.Close()
}

// stageModules copies the wanted modules, with all that they depend on, to
// tmp/lib/modules/RELEASE, decompresses them and runs depmod.
func stageModules(ctx context.Context, k *Kernel, tmp string) error {
	src := k.Modules()
	dst := filepath.Join(tmp, "lib/modules", k.Release)
	var all []string // below src/kernel
	err := filepath.WalkDir(filepath.Join(src, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			rel, _ := filepath.Rel(filepath.Join(src, "kernel"), p)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		return err
	}
	under := func(p string, dirs []string) bool {
		return slices.ContainsFunc(dirs, func(d string) bool {
			return strings.HasPrefix(p, d+"/") || strings.HasPrefix(p, d+".ko")
		})
	}
	wanted := map[string]bool{}
	byName := map[string]string{} // module name → path
	for _, p := range all {
		byName[moduleName(p)] = p
		if under(p, moduleDirs) && !under(p, withoutModules) {
			wanted[p] = true
		}
	}
	staged := map[string]bool{}
	// A module's dependencies are in its own .modinfo, which is readable only
	// once it is decompressed: stage, read, stage what that asks for.
	for len(wanted) > 0 {
		var compressed, plain []string
		for _, p := range sortedKeys(wanted) {
			to := filepath.Join(dst, "kernel", p)
			if err := copyFile(to, filepath.Join(src, "kernel", p)); err != nil {
				return err
			}
			staged[p] = true
			if strings.HasSuffix(p, ".ko") {
				plain = append(plain, to)
				continue
			}
			compressed = append(compressed, to)
			plain = append(plain, strings.TrimSuffix(to, filepath.Ext(to)))
		}
		if err := decompress(ctx, compressed); err != nil {
			return err
		}
		wanted = map[string]bool{}
		for _, p := range plain {
			deps, err := moduleDepends(p)
			if err != nil {
				return err
			}
			for _, d := range deps {
				if q, ok := byName[d]; ok && !staged[q] {
					wanted[q] = true
				}
			}
		}
	}
	for _, f := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if err := copyFile(filepath.Join(dst, f), filepath.Join(src, f)); err != nil {
			return err
		}
	}
	depmod := "depmod"
	if _, err := exec.LookPath(depmod); err != nil {
		depmod = "/sbin/depmod"
	}
	_, err = output(ctx, "", depmod, "-b", tmp, k.Release)
	return err
}

// moduleName gives the name by which modules refer to each other.
func moduleName(p string) string {
	name, _, _ := strings.Cut(path.Base(p), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// decompress unpacks .ko.xz, .ko.zst and .ko.gz in place.
func decompress(ctx context.Context, files []string) error {
	programs := map[string][]string{".xz": {"xz", "-d"}, ".zst": {"zstd", "-q", "-d", "--rm"}, ".gz": {"gzip", "-d"}}
	byExt := map[string][]string{}
	for _, f := range files {
		byExt[filepath.Ext(f)] = append(byExt[filepath.Ext(f)], f)
	}
	for _, ext := range sortedKeys(byExt) {
		p, ok := programs[ext]
		if !ok {
			return fmt.Errorf("%s: unknown compression of modules", byExt[ext][0])
		}
		args := append(slices.Clone(p[1:]), "--")
		if _, err := output(ctx, "", p[0], append(args, byExt[ext]...)...); err != nil {
			return err
		}
	}
	return nil
}

// moduleDepends reads "depends" from a module's .modinfo section.
func moduleDepends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, nil
	}
	b, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var deps []string
	for kv := range strings.SplitSeq(string(b), "\x00") {
		if v, ok := strings.CutPrefix(kv, "depends="); ok && v != "" {
			for d := range strings.SplitSeq(v, ",") {
				deps = append(deps, strings.ReplaceAll(d, "-", "_"))
			}
		}
		// softdep=pre: crc32c-generic
		if v, ok := strings.CutPrefix(kv, "softdep="); ok {
			for d := range strings.FieldsSeq(v) {
				if !strings.HasSuffix(d, ":") {
					deps = append(deps, strings.ReplaceAll(d, "-", "_"))
				}
			}
		}
	}
	return deps, nil
}

func copyFile(to, from string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
