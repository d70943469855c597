# OpenSSL: every digest and cipher over the same bytes, signatures, and its speed command's loops.
#
# packages: openssl
# memory: 512M
# limit: 300
cd /tmp
# A megabyte that depends on a cipher itself.
head -c 1048576 /dev/zero | openssl enc -aes-128-ctr -K 000102030405060708090a0b0c0d0e0f -iv 00 >data 2>/dev/null

openssl list -digest-commands | tr -s ' ' '\n' | grep . | while read -r digest; do
    echo "$digest $(openssl dgst -r "-$digest" data 2>/dev/null | cut -d' ' -f1)"
done

key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
iv=0f0e0d0c0b0a09080706050403020100
openssl enc -list | tr -s ' ' '\n' | grep ^- | grep -v -e wrap -e xts | while read -r cipher; do
    openssl enc "$cipher" -K $key -iv $iv -in data -out sealed 2>/dev/null || continue
    openssl enc -d "$cipher" -K $key -iv $iv -in sealed -out opened 2>/dev/null
    echo "$cipher $(sha256sum <sealed | cut -c1-16) $(cmp -s data opened && echo opens)"
done

openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out rsa.pem 2>/dev/null
openssl genpkey -algorithm ed25519 -out ed25519.pem
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out p256.pem
openssl genpkey -algorithm X25519 -out x1.pem
openssl genpkey -algorithm X25519 -out x2.pem
for kind in rsa p256; do
    openssl pkey -in $kind.pem -pubout -out $kind.pub
    openssl dgst -sha256 -sign $kind.pem -out $kind.sig data
    echo "$kind: $(openssl dgst -sha256 -verify $kind.pub -signature $kind.sig data)"
done
head -c 1000 data >short
openssl pkey -in ed25519.pem -pubout -out ed25519.pub
openssl pkeyutl -sign -rawin -inkey ed25519.pem -in short -out ed25519.sig
openssl pkeyutl -verify -rawin -pubin -inkey ed25519.pub -in short -sigfile ed25519.sig
openssl pkey -in x1.pem -pubout -out x1.pub
openssl pkey -in x2.pem -pubout -out x2.pub
openssl pkeyutl -derive -inkey x1.pem -peerkey x2.pub -out one
openssl pkeyutl -derive -inkey x2.pem -peerkey x1.pub -out two
cmp one two && echo "x25519: both sides agree"
openssl prime -generate -bits 512 | xargs openssl prime | sed 's/.*is/512 bits:/'

for what in sha256 sha512 '-evp aes-256-gcm' '-evp chacha20-poly1305' rsa2048 ecdsap256; do
    # shellcheck disable=SC2086 # an option and its value
    openssl speed -seconds 1 -bytes 8192 $what >/dev/null 2>speed || cat speed
    grep -E '^Doing' speed >&2 || echo "speed $what did nothing"
    echo "speed $what: ended"
done
